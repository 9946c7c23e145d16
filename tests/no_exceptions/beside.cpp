// A file of the same program that is compiled with exceptions: what it calls throws.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/tensor_ref.hpp>

#if defined(TASKVEC_NO_EXCEPTIONS)
#error "this file has exceptions"
#endif

bool throws_beside();
bool throws_beside()
{
    float values[2]{};
    try {
        (void)taskvec::as_tensor(taskvec::host_view<float>(values, 2), {3});
    }
    catch (const taskvec::shape_mismatch& error) {
        return error.code() == taskvec::error_code::shape_invalid;
    }
    return false;
}
