// An error without exceptions: the handler gets what would have been thrown, and its word is final.
// SPDX-License-Identifier: Apache-2.0
#include <everything_portable.hpp>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <thread>

#if !defined(TASKVEC_NO_EXCEPTIONS)
#error "-fno-exceptions should have been noticed"
#endif

/// Ends the process from the handler, beside whatever other threads are doing.
[[noreturn]] void end(bool right)
{
    std::fflush(stdout);
    std::_Exit(right ? 0 : 1);
}

/// Two threads fail at once, and each index of many: the handler is called once, and sees the error alone.
int fail_on_threads()
{
    static std::atomic<int> calls{0};
    taskvec::set_error_handler([](const taskvec::error& failure) {
        const int before = calls.fetch_add(1);
        std::this_thread::sleep_for(std::chrono::milliseconds(20)); // time for the others to fail too
        const bool right = before == 0 && calls.load() == 1 && std::strcmp(failure.what(), "every one fails") == 0;
        std::puts(right ? failure.what() : "the handler was called more than once");
        end(right);
    });
    taskvec::for_each_index(taskvec::cpu{.threads = 8}, 1000, [](std::size_t, std::size_t) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::inputs_empty, "every one fails");
    });
    std::puts("the error was not noticed");
    return 1;
}

#if __has_include(<nlohmann/json.hpp>)
#include <taskvec/formats/safetensors.hpp>

/// A merge into a file that is cancelled leaves no temporary file: it is gone before the handler is called.
int cancel_a_merge()
{
    using namespace taskvec;
    char name[] = "/tmp/taskvec-cancelled-XXXXXX";
    static std::filesystem::path folder = mkdtemp(name);
    set_error_handler([](const error& failure) {
        const bool left = std::filesystem::exists(folder / "new") || !std::filesystem::is_empty(folder);
        std::filesystem::remove_all(folder);
        std::puts(left ? "a temporary file was left behind" : failure.what());
        end(!left && failure.kind() == error_kind::cancelled);
    });
    const std::vector<float> base(100'000);
    const const_model_ref model{{"w", as_tensor(as_view(base))}};
    const aligned_models models(&model, {&model, 1});
    output_directory directory(folder / "new" / "merged");
    safetensors_writer out(directory.path() / "model.safetensors", models.outputs());
    const cpu policy{.progress = [](const progress_event&) { return false; }};
    merge(policy, task_arithmetic_options{}, models, out);
    std::puts("the merge was not cancelled");
    return 1;
}
#else
int cancel_a_merge()
{
    std::puts("skipped: no JSON library, so no files");
    return 0;
}
#endif

bool throws_beside();

int main(int count, char** words)
{
    if (!throws_beside()) {
        std::puts("the file with exceptions did not throw");
        return 1;
    }
    if (count > 1) { return std::string_view(words[1]) == "threads" ? fail_on_threads() : cancel_a_merge(); }
    taskvec::set_error_handler([](const taskvec::error& failure) {
        const bool right = failure.kind() == taskvec::error_kind::shape_mismatch
            && failure.code() == taskvec::error_code::shape_invalid
            && std::strcmp(failure.what(), "a view of 2 elements cannot have shape [3]") == 0;
        std::puts(failure.what());
        end(right);
    });
    float values[2]{};
    (void)taskvec::as_tensor(taskvec::host_view<float>(values, 2), {3});
    std::puts("the error was not noticed");
    return 1;
}
