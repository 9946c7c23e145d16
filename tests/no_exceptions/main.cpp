// An error without exceptions: the handler gets what would have been thrown, and its word is final.
// SPDX-License-Identifier: Apache-2.0
#include <everything_portable.hpp>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if !defined(TASKVEC_NO_EXCEPTIONS)
#error "-fno-exceptions should have been noticed"
#endif

int main()
{
    taskvec::set_error_handler([](const taskvec::error& failure) {
        const bool right = failure.kind() == taskvec::error_kind::shape_mismatch
            && failure.code() == taskvec::error_code::shape_invalid
            && std::strcmp(failure.what(), "a view of 2 elements cannot have shape [3]") == 0;
        std::puts(failure.what());
        std::exit(right ? 0 : 1);
    });
    float values[2]{};
    (void)taskvec::as_tensor(taskvec::host_view<float>(values, 2), {3});
    std::puts("the error was not noticed");
    return 1;
}
