// An error that says nothing one could search for, in a function that nobody calls yet.
// SPDX-License-Identifier: Apache-2.0
// error: no matching function for call to
#include <taskvec/core/error.hpp>

template <class T>
[[noreturn]] void refuse(T)
{
#ifdef TASKVEC_FAULT
    taskvec::raise<taskvec::invalid_argument>("no task was given");
#else
    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::inputs_empty, "no task was given");
#endif
}

int main() { }
