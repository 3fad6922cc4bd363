#include "pack.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "panel.h"

namespace deskside {

namespace {

// Copies arrays over the 16 rows, one after another: to a panel, or back (kBack).
template <bool kBack> struct Mover {
  using Row = std::conditional_t<kBack, uint8_t*, const uint8_t*>;
  std::conditional_t<kBack, const uint8_t*, uint8_t*> panel;

  template <int Bytes, class F> void rows(F&& field) {
    for (int r = 0; r < kPanelRows; r++, panel += Bytes) move<Bytes>(field(r), panel);
  }
  // Copies `Vectors` times four bytes of every row.
  template <int Vectors, class F> void vectors(F&& field) {
    for (int r = 0; r < kPanelRows; r++) {
      const Row row = field(r);
      for (int j = 0; j < Vectors; j++) move<4>(row + 4 * j, panel + j * kVector + 4 * r);
    }
    panel += Vectors * kVector;
  }

 private:
  template <int Bytes> static void move(const uint8_t* row, uint8_t* at) {
    std::memcpy(at, row, Bytes);
  }
  template <int Bytes> static void move(uint8_t* row, const uint8_t* at) {
    std::memcpy(row, at, Bytes);
  }
};

// Packs 32 values below 16 in IQ4_NL's order: value m in the low nibble, m + 16 in the high one.
void join_nibbles(const uint8_t* v, uint8_t* to) {
  for (int m = 0; m < 16; m++) to[m] = uint8_t((v[m] & 15) | v[m + 16] << 4);
}

void split_nibbles(const uint8_t* from, uint8_t* v) {
  for (int m = 0; m < 16; m++) v[m] = from[m] & 15, v[m + 16] = from[m] >> 4;
}

void pack_q4_k(const uint8_t* qs, int b, uint8_t* to) {
  uint8_t v[32];
  const uint8_t* x = qs + 32 * (b / 2);
  for (int i = 0; i < 32; i++) v[i] = b % 2 ? x[i] >> 4 : x[i] & 15;
  join_nibbles(v, to);
}

// Call it with b ascending: the even block writes the bytes, the odd one adds to them.
void unpack_q4_k(const uint8_t* from, int b, uint8_t* qs) {
  uint8_t v[32];
  split_nibbles(from, v);
  uint8_t* x = qs + 32 * (b / 2);
  for (int i = 0; i < 32; i++) x[i] = b % 2 ? uint8_t(x[i] | v[i] << 4) : v[i];
}

// Gathers bit `b` of 32 bytes: bit g of byte i is that of weight 4g + i.
void gather_bits(const uint8_t* qh, int b, uint8_t* to) {
  for (int i = 0; i < 4; i++) {
    unsigned f = 0;
    for (int g = 0; g < 8; g++) f |= unsigned(qh[4 * g + i] >> b & 1) << g;
    to[i] = uint8_t(f);
  }
}

// The inverse. Call it with b ascending: b = 0 clears the other bits.
void scatter_bits(const uint8_t* from, int b, uint8_t* qh) {
  for (int i = 0; i < 4; i++)
    for (int g = 0; g < 8; g++) {
      const unsigned bit = from[i] >> g & 1u;
      qh[4 * g + i] = uint8_t(b ? qh[4 * g + i] | bit << b : bit);
    }
}

void gather_bits(uint32_t qh, uint8_t* to) {
  for (int i = 0; i < 4; i++) {
    unsigned f = 0;
    for (int g = 0; g < 8; g++) f |= (qh >> (4 * g + i) & 1) << g;
    to[i] = uint8_t(f);
  }
}

uint32_t scatter_bits(const uint8_t* from) {
  uint32_t qh = 0;
  for (int i = 0; i < 4; i++)
    for (int g = 0; g < 8; g++) qh |= uint32_t(from[i] >> g & 1) << (4 * g + i);
  return qh;
}

// Writes the 256 weights of a block of Q6_K to v, as values 0..63 (docs/MODEL.md).
void values_q6_k(const BlockQ6_K& q, uint8_t* v) {
  for (int h = 0; h < 2; h++, v += 128) {
    const uint8_t *ql = q.ql + 64 * h, *qh = q.qh + 32 * h;
    for (int i = 0; i < 32; i++) {
      v[i] = uint8_t((ql[i] & 15) | (qh[i] & 3) << 4);
      v[i + 32] = uint8_t((ql[i + 32] & 15) | (qh[i] >> 2 & 3) << 4);
      v[i + 64] = uint8_t(ql[i] >> 4 | (qh[i] >> 4 & 3) << 4);
      v[i + 96] = uint8_t(ql[i + 32] >> 4 | (qh[i] >> 6 & 3) << 4);
    }
  }
}

void block_q6_k(const uint8_t* v, BlockQ6_K& q) {
  for (int h = 0; h < 2; h++, v += 128) {
    uint8_t *ql = q.ql + 64 * h, *qh = q.qh + 32 * h;
    for (int i = 0; i < 32; i++) {
      ql[i] = uint8_t((v[i] & 15) | v[i + 64] << 4);
      ql[i + 32] = uint8_t((v[i + 32] & 15) | v[i + 96] << 4);
      qh[i] = uint8_t(v[i] >> 4 | v[i + 32] >> 4 << 2 | v[i + 64] >> 4 << 4 | v[i + 96] >> 4 << 6);
    }
  }
}

void add_top_bits(const uint8_t* from, uint8_t* v) {
  for (int h = 0; h < 2; h++)
    for (int i = 0; i < 4; i++)
      for (int g = 0; g < 4; g++)
        v[16 * h + 4 * g + i] |= uint8_t((from[4 * h + i] >> (2 * g) & 3) << 4);
}

void top_bits(const uint8_t* v, uint8_t* to) {
  for (int h = 0; h < 2; h++)
    for (int i = 0; i < 4; i++) {
      unsigned f = 0;
      for (int g = 0; g < 4; g++) f |= unsigned(v[16 * h + 4 * g + i] >> 4) << (2 * g);
      to[4 * h + i] = uint8_t(f);
    }
}

template <Type T, bool kBack>
using BlockOf = std::conditional_t<kBack, typename Panel<T>::Block, const typename Panel<T>::Block>;

// Copies a superblock of 16 rows to a panel, or back.
template <Type T, bool kBack>
void move_superblock(BlockOf<T, kBack>* const* rows, decltype(Mover<kBack>::panel) panel) {
  using Row = typename Mover<kBack>::Row;
  Mover<kBack> w{panel};
  const auto raw = [&](int r) { return reinterpret_cast<Row>(rows[r]); };
  const auto each = [](auto&& f) {
    for (int r = 0; r < kPanelRows; r++) f(r);
  };
  if constexpr (T == Type::Q4_0 || T == Type::IQ4_NL) {
    w.template rows<2>(raw);
    w.template vectors<4>([&](int r) { return rows[r]->qs; });
  } else if constexpr (T == Type::Q8_0) {
    w.template rows<2>(raw);
    w.template vectors<8>([&](int r) { return reinterpret_cast<Row>(rows[r]->qs); });
  } else if constexpr (T == Type::Q4_1) {
    w.template rows<2>(raw);
    w.template rows<2>([&](int r) { return raw(r) + 2; });
    w.template vectors<4>([&](int r) { return rows[r]->qs; });
  } else if constexpr (T == Type::Q5_0 || T == Type::Q5_1) {
    w.template rows<2>(raw);
    if constexpr (T == Type::Q5_1) w.template rows<2>([&](int r) { return raw(r) + 2; });
    uint8_t fifth[kPanelRows][4];
    if constexpr (!kBack) each([&](int r) { gather_bits(rows[r]->qh, fifth[r]); });
    w.template vectors<1>([&](int r) { return fifth[r]; });
    if constexpr (kBack) each([&](int r) { rows[r]->qh = scatter_bits(fifth[r]); });
    w.template vectors<4>([&](int r) { return rows[r]->qs; });
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    w.template rows<2>(raw);
    w.template rows<2>([&](int r) { return raw(r) + 2; });
    w.template vectors<3>([&](int r) { return rows[r]->scales; });
    uint8_t part[kPanelRows][16];
    const auto own = [&](int r) { return part[r]; };
    for (int b = 0; b < 8; b++) {
      if constexpr (T == Type::Q5_K) {
        if constexpr (!kBack) each([&](int r) { gather_bits(rows[r]->qh, b, part[r]); });
        w.template vectors<1>(own);
        if constexpr (kBack) each([&](int r) { scatter_bits(part[r], b, rows[r]->qh); });
      }
      if constexpr (!kBack) each([&](int r) { pack_q4_k(rows[r]->qs, b, part[r]); });
      w.template vectors<4>(own);
      if constexpr (kBack) each([&](int r) { unpack_q4_k(part[r], b, rows[r]->qs); });
    }
  } else if constexpr (T == Type::Q6_K) {
    w.template rows<2>([&](int r) { return reinterpret_cast<Row>(&rows[r]->d); });
    for (int i = 0; i < 16; i++)
      w.template rows<1>([&](int r) { return reinterpret_cast<Row>(rows[r]->scales + i); });
    uint8_t v[kPanelRows][256], part[kPanelRows][16];
    const auto own = [&](int r) { return part[r]; };
    if constexpr (!kBack) each([&](int r) { values_q6_k(*rows[r], v[r]); });
    for (int b = 0; b < 8; b++) {
      if constexpr (!kBack) each([&](int r) { join_nibbles(v[r] + 32 * b, part[r]); });
      w.template vectors<4>(own);
      if constexpr (kBack) each([&](int r) { split_nibbles(part[r], v[r] + 32 * b); });
      if constexpr (!kBack) each([&](int r) { top_bits(v[r] + 32 * b, part[r]); });
      w.template vectors<2>(own);
      if constexpr (kBack) each([&](int r) { add_top_bits(part[r], v[r] + 32 * b); });
    }
    if constexpr (kBack) each([&](int r) { block_q6_k(v[r], *rows[r]); });
  } else if constexpr (T == Type::IQ4_XS) {
    w.template rows<2>(raw);
    w.template rows<2>([&](int r) { return raw(r) + 2; });
    w.template vectors<1>([&](int r) { return rows[r]->scales_l; });
    for (int b = 0; b < 8; b++) w.template vectors<4>([&](int r) { return rows[r]->qs + 16 * b; });
  } else if constexpr (T == Type::IQ4_KS) {
    for (int b = 0; b < 8; b++) w.template rows<1>([&](int r) { return rows[r]->scales + b; });
    for (int b = 0; b < 8; b++) w.template vectors<4>([&](int r) { return rows[r]->qs + 16 * b; });
  } else {
    static_assert(T == Type::IQ4_KSS);
    for (int b = 0; b < 8; b++)
      w.template vectors<4>([&](int r) { return reinterpret_cast<Row>(rows[r]->qs + 8 * b); });
  }
}

template <Type T> void pack_panel(const uint8_t* const* rows, int64_t cols, uint8_t* to) {
  using P = Panel<T>;
  using Block = typename P::Block;
  if constexpr (P::header != 0)
    for (int r = 0; r < kPanelRows; r++, to += P::header) std::memcpy(to, rows[r], P::header);
  const Block* block[kPanelRows];
  for (int64_t b = 0; b < cols / (32 * P::blocks); b++, to += P::bytes) {
    for (int r = 0; r < kPanelRows; r++)
      block[r] = reinterpret_cast<const Block*>(rows[r] + P::header) + b;
    move_superblock<T, false>(block, to);
  }
}

template <Type T> void unpack_panel(const uint8_t* from, int64_t cols, uint8_t* const* rows) {
  using P = Panel<T>;
  using Block = typename P::Block;
  if constexpr (P::header != 0)
    for (int r = 0; r < kPanelRows; r++, from += P::header) std::memcpy(rows[r], from, P::header);
  Block* block[kPanelRows];
  for (int64_t b = 0; b < cols / (32 * P::blocks); b++, from += P::bytes) {
    for (int r = 0; r < kPanelRows; r++)
      block[r] = reinterpret_cast<Block*>(rows[r] + P::header) + b;
    move_superblock<T, true>(block, from);
  }
}

struct Format {
  Type type;
  int block, bytes, header;  // weights and bytes of a file's block, bytes before a row's first
  // Null where rows are copied.
  void (*pack_panel)(const uint8_t* const* rows, int64_t cols, uint8_t* to);
  void (*unpack_panel)(const uint8_t* from, int64_t cols, uint8_t* const* rows);
};

template <Type T> constexpr Format packed() {
  using P = Panel<T>;
  return {T,         32 * P::blocks, int(sizeof(typename P::Block)),
          P::header, pack_panel<T>,  unpack_panel<T>};
}

// clang-format off
constexpr Format kFormats[] = {
    {Type::F32, 1, 4, 0, nullptr, nullptr}, {Type::F16, 1, 2, 0, nullptr, nullptr},
    {Type::BF16, 1, 2, 0, nullptr, nullptr},
    packed<Type::Q4_0>(), packed<Type::Q4_1>(), packed<Type::Q5_0>(), packed<Type::Q5_1>(),
    packed<Type::Q8_0>(), packed<Type::Q4_K>(), packed<Type::Q5_K>(), packed<Type::Q6_K>(),
    packed<Type::IQ4_NL>(), packed<Type::IQ4_XS>(), packed<Type::IQ4_KS>(), packed<Type::IQ4_KSS>(),
};
// clang-format on

// Null for a type without a kernel.
const Format* format(Type type) {
  for (const Format& f : kFormats)
    if (f.type == type) return &f;
  return nullptr;
}

void read_all(int fd, int64_t offset, int64_t bytes, uint8_t* to) {
  while (bytes > 0) {
    const ssize_t got = pread(fd, to, size_t(bytes), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::runtime_error(std::string("cannot be read: ") + strerror(errno));
    if (got == 0) throw std::runtime_error("ends early: the file was cut off after it was opened");
    to += got, offset += got, bytes -= got;
  }
}

}  // namespace

int64_t file_row_bytes(Type type, int64_t n) {
  const Format* f = format(type);
  return !f || n < 1 || n % f->block ? -1 : n / f->block * f->bytes + f->header;
}

void pack(const Source& from, Type type, int64_t cols, int64_t rows, int64_t groups, uint8_t* to,
          int64_t stride, int n_threads) {
  constexpr int64_t kChunk = int64_t(256) << 10;  // bytes read at a time: they stay in L2
  const int64_t row_bytes = file_row_bytes(type, cols);
  const int64_t panels = panels_of(rows);
  const int64_t per_task = std::max<int64_t>(1, kChunk / (row_bytes * kPanelRows));
  const int64_t tasks_per_group = (panels + per_task - 1) / per_task;
  const Format* const f = format(type);
  if (!f) throw std::invalid_argument("pack: a type without a layout");
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;

  const auto work = [&] {
    try {
      std::vector<uint8_t> buffer(from.memory ? 0 : size_t(per_task * kPanelRows * row_bytes));
      const std::vector<uint8_t> zeros(size_t(row_bytes), 0);
      for (int64_t task; (task = next++) < tasks_per_group * groups;) {
        const int64_t group = task / tasks_per_group, p0 = task % tasks_per_group * per_task;
        const int64_t p1 = std::min(p0 + per_task, panels);
        const int64_t r0 = p0 * kPanelRows, n = std::min(p1 * kPanelRows, rows) - r0;
        const int64_t at = (group * rows + r0) * row_bytes;
        const uint8_t* source = buffer.data();
        if (from.memory)
          source = from.memory + at;
        else
          read_all(from.fd, from.offset + at, n * row_bytes, buffer.data());
        for (int64_t p = p0; p < p1; p++) {
          uint8_t* panel = to + (group * panels + p) * stride;
          const int64_t first = (p - p0) * kPanelRows;
          if (!f->pack_panel) {
            std::memcpy(panel, source + first * row_bytes,
                        size_t(std::min<int64_t>(kPanelRows, n - first) * row_bytes));
            continue;
          }
          const uint8_t* row[kPanelRows];
          for (int r = 0; r < kPanelRows; r++)
            row[r] = first + r < n ? source + (first + r) * row_bytes : zeros.data();
          f->pack_panel(row, cols, panel);
        }
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
      next = tasks_per_group * groups;
    }
  };
  std::vector<std::thread> threads;
  const int64_t useful = std::min<int64_t>(n_threads, tasks_per_group * groups);
  try {
    for (int64_t i = 1; i < useful; i++) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // The threads that started do the work.
  }
  work();
  for (std::thread& t : threads) t.join();
  if (error) std::rethrow_exception(error);
}

void unpack(const uint8_t* from, Type type, int64_t cols, int64_t rows, int64_t stride,
            uint8_t* to) {
  const Format* const f = format(type);
  if (!f) throw std::invalid_argument("unpack: a type without a layout");
  const int64_t row_bytes = file_row_bytes(type, cols);
  std::vector<uint8_t> none;  // receives the last panel's padding rows
  for (int64_t r0 = 0; r0 < rows; r0 += kPanelRows, from += stride, to += kPanelRows * row_bytes) {
    const int64_t n = std::min<int64_t>(kPanelRows, rows - r0);
    if (!f->unpack_panel) {
      std::memcpy(to, from, size_t(n * row_bytes));
      continue;
    }
    if (n < kPanelRows) none.resize(size_t(row_bytes));
    uint8_t* row[kPanelRows];
    for (int r = 0; r < kPanelRows; r++) row[r] = r < n ? to + r * row_bytes : none.data();
    f->unpack_panel(from, cols, row);
  }
}

}  // namespace deskside
