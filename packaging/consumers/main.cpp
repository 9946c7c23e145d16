// The same program for every way of using taskvec: merges small models, in memory or, with taskvec's io part, from
// files to a file, and prints the version that it was built with. SPDX-License-Identifier: Apache-2.0
#if defined(CORE_ONLY)
#include <taskvec/methods/task_arithmetic.hpp>
#elif defined(WITH_IO)
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/safetensors.hpp>
#include <taskvec/methods/ties.hpp>
#else
#include <taskvec/taskvec.hpp>
#endif

#include <cstdio>
#include <cstring>
#include <vector>

#if defined(WITH_IO)
// TIES of three models, which are files of the working directory. The result is read back.
bool merge_models()
{
    const auto write = [](const char* name, const std::vector<float>& values) {
        taskvec::write_safetensors(name, {{"layer.weight", {values.data(), taskvec::dtype::f32, {2, 3}}}});
    };
    write("base.safetensors", {0, 0, 0, 0, 0, 0});
    write("first.safetensors", {4, 1, 3, 0, -2, 0});
    write("second.safetensors", {2, -1, -5, 0, -2, 0});
    write("third.safetensors", {0, -1, 1, 6, -2, 1});
    const auto base = taskvec::open_model("base.safetensors");
    const auto first = taskvec::open_model("first.safetensors"), second = taskvec::open_model("second.safetensors"),
               third = taskvec::open_model("third.safetensors");
    const std::vector<taskvec::const_model_ref> tasks{first.model(), second.model(), third.model()};

    const taskvec::aligned_models models(&base.model(), tasks);
    taskvec::safetensors_writer out("merged.safetensors", models.outputs());
    taskvec::merge(taskvec::cpu{.threads = 1}, taskvec::ties_options{.density = 0.5}, models, out);
    out.commit();

    const auto merged = taskvec::open_model("merged.safetensors");
    const std::vector<float> expected{3, -1, -5, 6, -2, 0};
    const auto* const weight = merged.model().find("layer.weight");
    return weight && std::memcmp(weight->data, expected.data(), 24) == 0;
}
#else
// Task arithmetic of two models in memory.
bool merge_models()
{
    const std::vector<float> base{1, 1};
    const std::vector<std::vector<float>> tasks{{3, 1}, {1, 5}};
    std::vector<float> merged(2);
    taskvec::merge(taskvec::cpu{.threads = 1}, taskvec::task_arithmetic_options{.lambda = 0.5}, base, tasks, merged);
    return merged == std::vector<float>{2, 3};
}
#endif

int main()
{
    const bool right = merge_models();
    std::printf("taskvec %d.%d.%d merges %s\n", TASKVEC_VERSION_MAJOR, TASKVEC_VERSION_MINOR, TASKVEC_VERSION_PATCH,
        right ? "right" : "wrong");
    return right ? 0 : 1;
}
