// What this build of the tool is made of.
// SPDX-License-Identifier: Apache-2.0
#include "build_facts.hpp"

#include "words.hpp"

#include <taskvec/core/instruction_set.hpp>

#include <CLI/Version.hpp>
#include <Eigen/src/Core/util/Macros.h>
#include <nlohmann/json_fwd.hpp>

namespace tool {

namespace {

#define TASKVEC_TEXT_(...) #__VA_ARGS__
#define TASKVEC_TEXT(...) TASKVEC_TEXT_(__VA_ARGS__)

std::string compiler()
{
#if defined(__clang__)
    std::string text =
        "clang " TASKVEC_TEXT(__clang_major__) "." TASKVEC_TEXT(__clang_minor__) "." TASKVEC_TEXT(__clang_patchlevel__);
#elif defined(__GNUC__)
    std::string text =
        "g++ " TASKVEC_TEXT(__GNUC__) "." TASKVEC_TEXT(__GNUC_MINOR__) "." TASKVEC_TEXT(__GNUC_PATCHLEVEL__);
#else
    std::string text = "of another name";
#endif
    text += ", C++" + std::to_string(__cplusplus / 100 % 100);
#if defined(__OPTIMIZE__)
    text += ", optimised";
#else
    text += ", not optimised";
#endif
#if !defined(NDEBUG)
    text += ", with assertions";
#endif
    return text;
}

/// Whatever the whole file was compiled for: what decompositions run with; kernels choose when they run.
std::string whole_target()
{
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "the architecture's baseline";
#endif
}

std::string architecture()
{
#if defined(__x86_64__)
    return "x86-64";
#elif defined(__aarch64__)
    return "aarch64";
#else
    return "another";
#endif
}

} // namespace

std::string compiled_instruction_sets()
{
#if defined(__x86_64__) && defined(__GNUC__)
    return "baseline, AVX2, AVX-512";
#elif defined(__GNUC__)
    return "baseline";
#else
    return "scalar";
#endif
}

std::string version_page()
{
    std::string text = "taskvec " + tool_version();
    text += "\ncompiler:         " + compiler();
    text += "\nprocessor:        " + architecture() + "; kernels for " + compiled_instruction_sets()
        + ", chosen when they run; the rest for " + whole_target();
    text += "\nlibraries:        Eigen " TASKVEC_TEXT(EIGEN_WORLD_VERSION) "." TASKVEC_TEXT(EIGEN_MAJOR_VERSION);
    text += "." TASKVEC_TEXT(EIGEN_MINOR_VERSION) ", CLI11 " CLI11_VERSION;
#if defined(NLOHMANN_JSON_VERSION_MAJOR)
    text += ", nlohmann_json " TASKVEC_TEXT(NLOHMANN_JSON_VERSION_MAJOR) "." TASKVEC_TEXT(NLOHMANN_JSON_VERSION_MINOR);
    text += "." TASKVEC_TEXT(NLOHMANN_JSON_VERSION_PATCH);
#endif
#if defined(TASKVEC_HAS_YAML)
    text += ", yaml-cpp " TASKVEC_YAML_VERSION;
#endif
    text += "\nlinked:           ";
#if defined(TASKVEC_STATIC_TOOL)
    text += "statically: it runs without the system's libraries, whatever their versions";
#else
    text += "with the system's shared libraries";
#endif
    text += "\noptional parts:   taskvec run: ";
#if defined(TASKVEC_HAS_YAML)
    text += "yes";
#else
    text += "no (needs yaml-cpp; Debian: libyaml-cpp-dev)";
#endif
    text += "; taskvec lorahub: ";
#if defined(TASKVEC_HAS_NLOPT)
    text += "yes";
#elif defined(TASKVEC_STATIC_TOOL)
    text += "no (needs NLopt, which this build has no static library of)";
#else
    text += "no (needs NLopt; Debian: libnlopt-dev)";
#endif
    text += "; --device cuda: ";
    text += has_cuda() ? "yes" : "no (the cuda preset has it)";
    return text;
}

} // namespace tool
