// Merges and selection as a distribution compiles them (-O2) over the same with all flags (-O3 -march=native), in turn
// in one process: what flags are still worth. bench_flags DIRECTORY-OF-MODULES
// SPDX-License-Identifier: Apache-2.0
#include "../ceiling.hpp"
#include "work.hpp"

#include <cstdio>
#include <dlfcn.h>
#include <string>

namespace {
flag_work load(const std::string& path)
{
    void* const module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!module) {
        std::fprintf(stderr, "%s\n", dlerror());
        std::exit(1);
    }
    const auto entry = reinterpret_cast<flag_work (*)()>(dlsym(module, "work"));
    if (!entry) { std::exit(1); }
    const flag_work work = entry();
    work.setup();
    return work;
}
} // namespace

int main(int count, char** words)
{
    const std::string folder = count > 1 ? words[1] : ".";
    const flag_work plain = load(folder + "/libbench_flags_plain.so"), all = load(folder + "/libbench_flags_all.so");
    for (int kind = 0; kind < work_kinds; ++kind) {
        std::vector<double> of_plain, of_all;
        for (int repetition = 0; repetition < 15; ++repetition) {
            of_plain.push_back(bench::seconds([&] { plain.run(kind); }));
            of_all.push_back(bench::seconds([&] { all.run(kind); }));
        }
        const double a = bench::median(of_plain), b = bench::median(of_all);
        std::printf(
            "%-28s -O2 %7.2f ms, -O3 -march=native %7.2f ms, ratio %.2f\n", work_names[kind], 1e3 * a, 1e3 * b, a / b);
    }
}
