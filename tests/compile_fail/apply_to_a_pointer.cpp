// A pointer has no length.
// SPDX-License-Identifier: Apache-2.0
// error: an argument is a pointer, which does not say how long it is
// lines: 25
#include <taskvec/arithmetic/task_vector.hpp>

#include <vector>

using namespace taskvec;

void f(const std::vector<float>& base, const std::vector<float>& vector, std::vector<float>& out)
{
#if defined(TASKVEC_FAULT)
    apply(cpu{}, base.data(), vector, 0.5, out);
#else
    apply(cpu{}, base, vector, 0.5, out);
#endif
}
