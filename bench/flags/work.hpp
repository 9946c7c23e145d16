// What bench/flags times in the same process, compiled with different flags: each set of flags is a module of its own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Runs one kind of work once over the module's own data. `kind` is 0 to work_kinds - 1; `setup` makes the data.
struct flag_work {
    void (*setup)();
    void (*run)(int kind);
};
inline constexpr int work_kinds = 5;
inline constexpr const char* work_names[work_kinds] = {"TIES of 3 x 2^23 bf16", "TIES of 3 x 2^23 f32",
    "average of 3 x 2^23 bf16", "average of 3 x 2^23 f32", "k-th magnitude of 2^23 f32"};
