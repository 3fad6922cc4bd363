// The way of weights from a file's rows to panels in memory (panel.h).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace deskside {

// Bytes of a row of `cols` weights in a file; -1 for a type without a kernel or rows that are no
// whole blocks.
int64_t file_row_bytes(Type type, int64_t cols);

// Where a tensor's rows are: in memory, or in a file from `offset` on.
struct Source {
  const uint8_t* memory;
  int fd;
  int64_t offset;
};

// Packs `groups` matrices of `rows` rows, which follow each other in the source, to panels `stride`
// bytes apart from `to` on; a matrix's last panel is filled up with zero rows. Throws
// std::runtime_error where the file ends early or cannot be read.
void pack(const Source& from, Type type, int64_t cols, int64_t rows, int64_t groups, uint8_t* to,
          int64_t stride, int n_threads);

// The way back: one matrix of `rows` rows, whose panels are `stride` bytes apart from `from` on, to
// the file's bytes.
void unpack(const uint8_t* from, Type type, int64_t cols, int64_t rows, int64_t stride,
            uint8_t* to);

}  // namespace deskside
