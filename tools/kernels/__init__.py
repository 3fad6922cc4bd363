"""What the matrix kernels take: time, instructions, registers."""
