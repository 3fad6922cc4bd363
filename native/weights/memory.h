// Allocates memory in pages of a given size, on given NUMA nodes.
#pragma once

#include <cstdint>
#include <vector>

namespace deskside {

// k4K: no huge pages, whatever the system's default. kTransparent: huge pages if the system has
// them. k2M, k1G: pages that an administrator has reserved.
enum class Pages { k4K, kTransparent, k2M, k1G };

struct MemoryKind {
  Pages pages = Pages::kTransparent;
  // NUMA nodes over which the pages are interleaved. If empty, a page is on the node of the thread
  // that first touches it. strict: use no other node, even if these are full.
  std::vector<int> nodes{};
  bool strict = false;
};

// Zeroed memory. The system allocates a page when it is first touched, and reserved pages at once.
// Throws std::bad_alloc if there is no room, or too few pages are reserved.
class Arena {
 public:
  explicit Arena(int64_t bytes, const MemoryKind& kind = {});
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // The errno of the request for nodes, 0 if it was granted: ENOSYS for a kernel without NUMA,
  // EPERM in a container that forbids it.
  int nodes_error() const { return nodes_error_; }

 private:
  void* mapped_;
  uint8_t* data_;
  int64_t bytes_, mapped_bytes_;
  int nodes_error_ = 0;
};

}  // namespace deskside
