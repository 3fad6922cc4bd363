// Memory from the system: in pages of a chosen size, on chosen NUMA nodes.
#pragma once

#include <cstdint>
#include <vector>

namespace deskside {

// k4K: no huge pages, whatever the system would do. kTransparent: huge pages where the system has
// them. k2M, k1G: from the pages that an administrator has reserved.
enum class Pages { k4K, kTransparent, k2M, k1G };

struct MemoryKind {
  Pages pages = Pages::kTransparent;
  // NUMA nodes to spread the pages over in turn; empty: where the thread runs that first touches a
  // page. strict: on no other node, even if they are full.
  std::vector<int> nodes{};
  bool strict = false;
};

// Zeroed memory; pages are taken when first touched, reserved ones at once. Throws std::bad_alloc
// where there is no room, or too few pages are reserved.
class Arena {
 public:
  explicit Arena(int64_t bytes, const MemoryKind& kind = {});
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // Why the nodes that were asked for are not kept to (errno), 0 where they are: ENOSYS for a
  // kernel without NUMA, EPERM in a container that forbids it.
  int nodes_error() const { return nodes_error_; }

 private:
  void* mapped_;
  uint8_t* data_;
  int64_t bytes_, mapped_bytes_;
  int nodes_error_ = 0;
};

}  // namespace deskside
