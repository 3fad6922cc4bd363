#include "pack.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
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

// 32 weights of a row in a file: byte i has `Width` bits of weight i, from bit `shift` on. The
// panel's order of a row (panel.h), vector by vector, is 4 bytes of each.
template <int Width> void gather(const uint8_t* x, int shift, uint8_t* to) {
  constexpr int per = 8 / Width;  // groups a vector
  for (int v = 0; v < Width; v++)
    for (int i = 0; i < 4; i++) {
      unsigned f = 0;
      for (int g = 0; g < per; g++)
        f |= (x[4 * (per * v + g) + i] >> shift & ((1u << Width) - 1)) << (Width * g);
      to[4 * v + i] = uint8_t(f);
    }
}

// Nibbles have the order of IQ4_NL: m low, m + 16 high.
template <> void gather<4>(const uint8_t* x, int shift, uint8_t* to) {
  for (int m = 0; m < 16; m++)
    to[m] = uint8_t((x[m] >> shift & 15) | (x[m + 16] >> shift & 15) << 4);
}

// The inverse. Shift 0 comes first: it clears the other bits.
void put(uint8_t& x, int shift, int bits) { x = uint8_t(shift ? x | bits << shift : bits); }

template <int Width> void scatter(const uint8_t* from, int shift, uint8_t* x) {
  constexpr int per = 8 / Width;
  for (int v = 0; v < Width; v++)
    for (int i = 0; i < 4; i++)
      for (int g = 0; g < per; g++)
        put(x[4 * (per * v + g) + i], shift, from[4 * v + i] >> (Width * g) & ((1 << Width) - 1));
}

template <> void scatter<4>(const uint8_t* from, int shift, uint8_t* x) {
  for (int m = 0; m < 16; m++) put(x[m], shift, from[m] & 15), put(x[m + 16], shift, from[m] >> 4);
}

// Scale j of Q3_K has its low bits in nibble j / 8 of byte j % 8, and its high bits in bits 2 (j /
// 4) of byte 8 + j % 4. In IQ4_K's order these are nibble j % 2 of byte 4 + j / 2, bits 2 (j % 4)
// of byte j / 4.
void reorder_q3_scales(const uint8_t* x, uint8_t* to) {
  for (int j = 0; j < 16; j++) {
    put(to[4 + j / 2], j % 2 * 4, x[j % 8] >> (j / 8 * 4) & 15);
    put(to[j / 4], j % 4 * 2, x[8 + j % 4] >> (j / 4 * 2) & 3);
  }
}

void restore_q3_scales(const uint8_t* from, uint8_t* x) {
  for (int j = 0; j < 16; j++) {
    put(x[j % 8], j / 8 * 4, from[4 + j / 2] >> (j % 2 * 4) & 15);
    put(x[8 + j % 4], j / 4 * 2, from[j / 4] >> (j % 4 * 2) & 3);
  }
}

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
  // `Width` bits of 32 weights of every row, by gather or scatter.
  template <int Width, class F> void plane(F&& field, int shift) {
    uint8_t part[4 * Width];
    for (int r = 0; r < kPanelRows; r++) {
      if constexpr (!kBack) gather<Width>(field(r), shift, part);
      for (int j = 0; j < Width; j++) {
        uint8_t* const at = part + 4 * j;
        if constexpr (kBack)
          move<4>(at, panel + j * kVector + 4 * r);
        else
          move<4>(static_cast<const uint8_t*>(at), panel + j * kVector + 4 * r);
      }
      if constexpr (kBack) scatter<Width>(part, shift, field(r));
    }
    panel += Width * kVector;
  }
  // The same of bits that `split` and `join` take out of a row's field and put back.
  template <int Width, class F, class Split, class Join>
  void high_bits(F&& field, Split split, Join join) {
    uint8_t v[kPanelRows][32];
    if constexpr (!kBack)
      for (int r = 0; r < kPanelRows; r++) split(field(r), v[r]);
    plane<Width>([&](int r) { return v[r]; }, 0);
    if constexpr (kBack)
      for (int r = 0; r < kPanelRows; r++) join(v[r], field(r));
  }
  // Q3_K's scales in the order of IQ4_K's: scales_h, scales_l.
  template <class F> void six_bit_scales(F&& field) {
    uint8_t v[kPanelRows][12];
    if constexpr (!kBack)
      for (int r = 0; r < kPanelRows; r++) reorder_q3_scales(field(r), v[r]);
    for (int i = 0; i < 12; i++) rows<1>([&](int r) -> Row { return v[r] + i; });
    if constexpr (kBack)
      for (int r = 0; r < kPanelRows; r++) restore_q3_scales(v[r], field(r));
  }

 private:
  template <int Bytes> static void move(const uint8_t* row, uint8_t* at) {
    std::memcpy(at, row, Bytes);
  }
  template <int Bytes> static void move(uint8_t* row, const uint8_t* at) {
    std::memcpy(row, at, Bytes);
  }
};

// High bits of 32 weights that a file has in an order of its own, one weight a byte: bit i of the
// word of Q5_0 and Q5_1 is that of weight i.
void split_fives(const uint8_t* qh, uint8_t* v) {
  for (int i = 0; i < 32; i++) v[i] = qh[i / 8] >> (i % 8) & 1;
}

void join_fives(const uint8_t* v, uint8_t* qh) {
  for (int i = 0; i < 32; i++) put(qh[i / 8], i % 8, v[i]);
}

// Byte l of Q6_0 has two bits of each of the weights l, 16 + l, 8 + l, 24 + l.
constexpr int kSixOrder[4] = {0, 16, 8, 24};

void split_sixes(const uint8_t* qh, uint8_t* v) {
  for (int l = 0; l < 8; l++)
    for (int k = 0; k < 4; k++) v[kSixOrder[k] + l] = qh[l] >> (2 * k) & 3;
}

void join_sixes(const uint8_t* v, uint8_t* qh) {
  for (int l = 0; l < 8; l++)
    for (int k = 0; k < 4; k++) put(qh[l], 2 * k, v[kSixOrder[k] + l]);
}

// Copies a superblock of 16 rows to a panel, or back.
template <Type T, bool kBack>
void move_superblock(const typename Mover<kBack>::Row* rows, decltype(Mover<kBack>::panel) panel) {
  using B = typename Panel<T>::Block;
  Mover<kBack> w{panel};
  // Byte `offset` of every row's block.
  const auto at = [rows](size_t offset) {
    return [rows, offset](int r) { return rows[r] + offset; };
  };
  if constexpr (T == Type::Q4_0 || T == Type::IQ4_NL) {
    w.template rows<2>(at(0));
    w.template vectors<4>(at(offsetof(B, qs)));
  } else if constexpr (T == Type::MXFP4) {
    w.template rows<1>(at(0));
    w.template vectors<4>(at(offsetof(B, qs)));
  } else if constexpr (T == Type::Q8_0) {
    w.template rows<2>(at(0));
    w.template vectors<8>(at(offsetof(B, qs)));
  } else if constexpr (T == Type::Q4_1) {
    w.template rows<2>(at(0));
    w.template rows<2>(at(offsetof(B, m)));
    w.template vectors<4>(at(offsetof(B, qs)));
  } else if constexpr (T == Type::Q5_0 || T == Type::Q5_1) {
    w.template rows<2>(at(0));
    if constexpr (T == Type::Q5_1) w.template rows<2>(at(offsetof(B, m)));
    w.template high_bits<1>(at(offsetof(B, qh)), split_fives, join_fives);
    w.template vectors<4>(at(offsetof(B, qs)));
  } else if constexpr (T == Type::Q6_0) {
    w.template rows<2>(at(0));
    w.template vectors<4>(at(offsetof(B, qs)));
    w.template high_bits<2>(at(offsetof(B, qh)), split_sixes, join_sixes);
  } else if constexpr (T == Type::Q2_K) {
    w.template rows<2>(at(offsetof(B, d)));
    w.template rows<2>(at(offsetof(B, dmin)));
    for (int i = 0; i < 16; i++) w.template rows<1>(at(offsetof(B, scales) + i));
    for (int b = 0; b < 8; b++)
      w.template plane<2>(at(offsetof(B, qs) + 32 * (b / 4)), 2 * (b % 4));
  } else if constexpr (T == Type::Q3_K) {
    w.template rows<2>(at(offsetof(B, d)));
    w.six_bit_scales(at(offsetof(B, scales)));
    for (int b = 0; b < 8; b++) {
      w.template plane<1>(at(offsetof(B, hmask)), b);
      w.template plane<2>(at(offsetof(B, qs) + 32 * (b / 4)), 2 * (b % 4));
    }
  } else if constexpr (T == Type::Q4_K || T == Type::Q5_K) {
    w.template rows<2>(at(0));
    w.template rows<2>(at(offsetof(B, dmin)));
    w.template vectors<3>(at(offsetof(B, scales)));
    for (int b = 0; b < 8; b++) {
      if constexpr (T == Type::Q5_K) w.template plane<1>(at(offsetof(B, qh)), b);
      w.template plane<4>(at(offsetof(B, qs) + 32 * (b / 2)), 4 * (b % 2));
    }
  } else if constexpr (T == Type::Q6_K) {
    w.template rows<2>(at(offsetof(B, d)));
    for (int i = 0; i < 16; i++) w.template rows<1>(at(offsetof(B, scales) + i));
    for (int b = 0; b < 8; b++) {
      w.template plane<4>(at(offsetof(B, ql) + 64 * (b / 4) + 32 * (b % 2)), 4 * (b % 4 / 2));
      w.template plane<2>(at(offsetof(B, qh) + 32 * (b / 4)), 2 * (b % 4));
    }
  } else if constexpr (T == Type::IQ4_XS) {
    w.template rows<2>(at(0));
    w.template rows<2>(at(offsetof(B, scales_h)));
    w.template vectors<1>(at(offsetof(B, scales_l)));
    for (int b = 0; b < 8; b++) w.template vectors<4>(at(offsetof(B, qs) + 16 * b));
  } else if constexpr (T == Type::IQ4_K || T == Type::IQ5_K) {
    w.template rows<2>(at(0));
    w.template rows<2>(at(offsetof(B, extra)));
    for (int i = 0; i < 12; i++) w.template rows<1>(at(offsetof(B, scales_h) + i));
    for (int b = 0; b < 8; b++) {
      if constexpr (T == Type::IQ5_K) {
        w.template plane<1>(at(offsetof(B, qh)), b);
        w.template plane<4>(at(offsetof(B, qs) + 32 * (b / 2)), 4 * (b % 2));
      } else {
        w.template vectors<4>(at(offsetof(B, qs) + 16 * b));
      }
    }
  } else if constexpr (T == Type::IQ6_K) {
    w.template rows<2>(at(0));
    w.template rows<2>(at(offsetof(B, extra)));
    for (int i = 0; i < 16; i++) w.template rows<1>(at(offsetof(B, scales) + i));
    for (int b = 0; b < 8; b++) {
      w.template plane<4>(at(offsetof(B, qs) + 32 * (b / 2)), 4 * (b % 2));
      w.template plane<2>(at(offsetof(B, qh) + 32 * (b / 4)), 2 * (b % 4));
    }
  } else if constexpr (T == Type::IQ4_KS || T == Type::IQ5_KS) {
    for (int b = 0; b < 8; b++) w.template rows<1>(at(offsetof(B, scales) + b));
    for (int b = 0; b < 8; b++) {
      if constexpr (T == Type::IQ5_KS) {
        w.template plane<1>(at(offsetof(B, qh)), b);
        w.template plane<4>(at(offsetof(B, qs) + 32 * (b / 2)), 4 * (b % 2));
      } else {
        w.template vectors<4>(at(offsetof(B, qs) + 16 * b));
      }
    }
  } else {
    static_assert(T == Type::IQ4_KSS);
    for (int b = 0; b < 8; b++) w.template vectors<4>(at(16 * b));
  }
}

// Copies the file's rows to a panel, or back: the header of each row, then its superblocks.
template <Type T, bool kBack>
void move_panel(const typename Mover<kBack>::Row* rows, int64_t cols,
                decltype(Mover<kBack>::panel) panel) {
  using P = Panel<T>;
  Mover<kBack> header{panel};
  if constexpr (P::header != 0) header.template rows<P::header>([&](int r) { return rows[r]; });
  typename Mover<kBack>::Row block[kPanelRows];
  for (int r = 0; r < kPanelRows; r++) block[r] = rows[r] + P::header;
  for (int64_t b = 0; b < cols / (32 * P::blocks); b++, header.panel += P::bytes) {
    move_superblock<T, kBack>(block, header.panel);
    for (int r = 0; r < kPanelRows; r++) block[r] += sizeof(typename P::Block);
  }
}

struct Format {
  Type type;
  int block, bytes, header;  // weights and bytes of a file's block, bytes before a row's first
  // Null where rows are copied.
  void (*pack_panel)(const uint8_t* const* rows, int64_t cols, uint8_t* to);
  void (*unpack_panel)(uint8_t* const* rows, int64_t cols, const uint8_t* from);
};

template <Type T> constexpr Format packed() {
  using P = Panel<T>;
  return {T,         32 * P::blocks,       int(sizeof(typename P::Block)),
          P::header, move_panel<T, false>, move_panel<T, true>};
}

// clang-format off
constexpr Format kFormats[] = {
    {Type::F32, 1, 4, 0, nullptr, nullptr}, {Type::F16, 1, 2, 0, nullptr, nullptr},
    {Type::BF16, 1, 2, 0, nullptr, nullptr},
    packed<Type::Q4_0>(), packed<Type::Q4_1>(), packed<Type::Q5_0>(), packed<Type::Q5_1>(),
    packed<Type::Q6_0>(), packed<Type::Q8_0>(), packed<Type::Q2_K>(), packed<Type::Q3_K>(),
    packed<Type::Q4_K>(), packed<Type::Q5_K>(), packed<Type::Q6_K>(), packed<Type::IQ4_NL>(),
    packed<Type::IQ4_XS>(), packed<Type::IQ4_K>(), packed<Type::IQ5_K>(), packed<Type::IQ6_K>(),
    packed<Type::IQ4_KS>(), packed<Type::IQ4_KSS>(), packed<Type::IQ5_KS>(), packed<Type::MXFP4>(),
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
        const int64_t at = group * from.group_bytes + r0 * row_bytes;
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
    f->unpack_panel(row, cols, from);
  }
}

}  // namespace deskside
