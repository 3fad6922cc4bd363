// Packs weights from a file's rows to panels in memory (panel.h), and unpacks them.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace deskside {

// Bytes of a row of `cols` weights in a file. -1 for a type without a kernel, or if the row is not
// made of whole blocks.
int64_t file_row_bytes(Type type, int64_t cols);

// Where a tensor's rows are: at `memory` if it is not null, else in the file `fd` from `offset` on.
struct Source {
  const uint8_t* memory;
  int fd;
  int64_t offset;
  int64_t group_bytes;  // from one matrix to the next
};

// Packs `groups` matrices of `rows` rows. Panels are written from `to` on, `stride` bytes apart. A
// matrix's last panel is padded with zero rows. Throws std::runtime_error if the file ends early or
// cannot be read.
void pack(const Source& from, Type type, int64_t cols, int64_t rows, int64_t groups, uint8_t* to,
          int64_t stride, int n_threads);

// The inverse for one matrix of `rows` rows: writes the file's bytes to `to`. The panels start at
// `from`, `stride` bytes apart.
void unpack(const uint8_t* from, Type type, int64_t cols, int64_t rows, int64_t stride,
            uint8_t* to);

}  // namespace deskside
