// Operations of this library alone: of rows, not of a quantizer.
#pragma once

#include "../tensors.h"

namespace diveq {

void unit(Tensor x, Maybe grad, Tensor out);
void rotate(Tensor from, Tensor to, Tensor x, bool transposed, Tensor out);

}  // namespace diveq
