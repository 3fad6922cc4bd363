#include "memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <new>
#include <system_error>
#include <thread>

namespace deskside {
namespace {

constexpr int64_t kHuge = int64_t(2) << 20;

int64_t page_bytes(Pages pages) { return pages == Pages::k1G ? int64_t(1) << 30 : kHuge; }

// The flags that map reserved pages: MAP_HUGETLB and log2 of the page size (linux/mman.h).
int reserved_flags([[maybe_unused]] Pages pages) {
#if defined(__linux__)
  return 0x40000 | (pages == Pages::k1G ? 30 : 21) << 26;
#else
  throw std::bad_alloc();
#endif
}

// mbind of linux/mempolicy.h; 0 or errno.
int set_nodes([[maybe_unused]] void* at, [[maybe_unused]] int64_t bytes,
              [[maybe_unused]] const MemoryKind& kind) {
#if defined(SYS_mbind)
  constexpr int kBind = 2, kInterleave = 3, kBits = 8 * int(sizeof(unsigned long));
  const int last = *std::max_element(kind.nodes.begin(), kind.nodes.end());
  std::vector<unsigned long> mask(size_t(last / kBits) + 1);
  for (int node : kind.nodes) mask[size_t(node / kBits)] |= 1ul << (node % kBits);
  // The kernel reads one bit less than this count.
  const unsigned long bits = mask.size() * kBits + 1;
  const int mode = kind.strict ? kBind : kInterleave;
  return syscall(SYS_mbind, at, size_t(bytes), mode, mask.data(), bits, 0) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

// Allocates all pages now, with several threads. Returns false if some are missing. A limit of the
// container or the nodes would otherwise end the process when it touches a page.
bool take_pages([[maybe_unused]] uint8_t* data, [[maybe_unused]] int64_t bytes,
                [[maybe_unused]] int64_t page) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, from Linux 5.14 on
  const int64_t piece = std::max<int64_t>(page, int64_t(64) << 20);
  std::atomic<int64_t> next{0};
  std::atomic<bool> missing{false};
  const auto work = [&] {
    for (int64_t at; !missing && (at = next.fetch_add(piece)) < bytes;) {
      int failed;
      do failed = madvise(data + at, size_t(std::min(piece, bytes - at)), kPopulateWrite);
      while (failed != 0 && (errno == EAGAIN || errno == EINTR));
      if (failed != 0 && errno != EINVAL) missing = true;
    }
  };
  std::vector<std::thread> threads;
  const int64_t useful = std::min<int64_t>(std::thread::hardware_concurrency(), bytes / piece);
  try {
    for (int64_t i = 1; i < std::min<int64_t>(useful, 16); i++) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // The threads that started do the work.
  }
  work();
  for (std::thread& t : threads) t.join();
  return !missing;
#else
  return true;
#endif
}

}  // namespace

Arena::Arena(int64_t bytes, const MemoryKind& kind) : bytes_(bytes) {
  const bool reserved = kind.pages == Pages::k2M || kind.pages == Pages::k1G;
  const int64_t page = page_bytes(kind.pages);
  // Reserved pages are aligned already, and mmap refuses at once if there are too few.
  mapped_bytes_ = std::max<int64_t>(1, (bytes + page - 1) / page) * page + (reserved ? 0 : page);
  const int flags = reserved ? reserved_flags(kind.pages) : MAP_NORESERVE;
  mapped_ = mmap(nullptr, size_t(mapped_bytes_), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  data_ =
      reinterpret_cast<uint8_t*>((reinterpret_cast<intptr_t>(mapped_) + page - 1) & ~(page - 1));
#if defined(MADV_HUGEPAGE)
  if (!reserved)
    madvise(mapped_, size_t(mapped_bytes_),
            kind.pages == Pages::k4K ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
#endif
  if (!kind.nodes.empty()) nodes_error_ = set_nodes(mapped_, mapped_bytes_, kind);
  if (reserved && !take_pages(data_, mapped_bytes_, page)) {
    munmap(mapped_, size_t(mapped_bytes_));
    throw std::bad_alloc();
  }
}

Arena::~Arena() { munmap(mapped_, size_t(mapped_bytes_)); }

}  // namespace deskside
