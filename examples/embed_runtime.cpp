// A runtime that owns everything: its weights, its memory, its threads. It serves several tasks from one merged model
// and switches between them in place. Compiled without exceptions and run-time type information.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/reuse/peru_fft.hpp>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory_resource>
#include <mutex>
#include <new>
#include <span>
#include <thread>
#include <utility>
#include <vector>

// What goes around the runtime's memory: every block of the global operator new is counted.
static std::atomic<std::size_t> blocks_of_new{0};
[[gnu::noinline]] void* operator new(std::size_t bytes)
{
    ++blocks_of_new;
    void* const place = std::malloc(bytes);
    if (!place) { std::abort(); }
    return place;
}
[[gnu::noinline]] void operator delete(void* place) noexcept
{
    std::free(place);
}
[[gnu::noinline]] void operator delete(void* place, std::size_t) noexcept
{
    std::free(place);
}

namespace {

// [memory]
// One block, taken when the runtime starts. What is given back is kept for the next who asks for as much.
class arena final : public std::pmr::memory_resource {
public:
    explicit arena(std::size_t bytes)
        : block_(static_cast<std::byte*>(std::aligned_alloc(grain, bytes)))
        , size_(bytes)
    { }
    arena(const arena&) = delete;
    arena& operator=(const arena&) = delete;
    ~arena() override { std::free(block_); }
    [[nodiscard]] std::size_t used() const noexcept { return used_; }

private:
    static constexpr std::size_t grain = 64;
    struct spare {
        spare* next;
        std::size_t bytes;
    };
    void* do_allocate(std::size_t bytes, std::size_t) override
    {
        bytes = (bytes + grain - 1) / grain * grain;
        const std::lock_guard lock(busy_); // several threads ask at once
        for (spare** at = &spares_; *at; at = &(*at)->next) {
            if ((*at)->bytes == bytes) { return std::exchange(*at, (*at)->next); }
        }
        if (bytes > size_ - used_) {
            std::fprintf(stderr, "the runtime's memory is used up\n");
            std::abort();
        }
        return block_ + std::exchange(used_, used_ + bytes);
    }
    void do_deallocate(void* place, std::size_t bytes, std::size_t) override
    {
        const std::lock_guard lock(busy_);
        spares_ = new (place) spare{spares_, (bytes + grain - 1) / grain * grain};
    }
    [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

    std::byte* block_;
    std::size_t size_, used_ = 0;
    spare* spares_ = nullptr;
    std::mutex busy_;
};
// [end]

// [pool]
// Threads that live as long as the runtime. run() calls body(0) … body(count − 1) on them and on the caller's.
class thread_pool {
public:
    explicit thread_pool(std::size_t threads)
    {
        for (std::size_t i = 0; i < threads; ++i) {
            threads_.emplace_back([this] { work(); });
        }
    }
    ~thread_pool()
    {
        {
            const std::lock_guard lock(busy_);
            over_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) { thread.join(); }
    }
    void run(std::size_t count, taskvec::function_ref<void(std::size_t)> body)
    {
        {
            const std::lock_guard lock(busy_);
            body_ = &body;
            count_ = count;
            next_ = 0;
            running_ = threads_.size();
            ++turn_;
        }
        wake_.notify_all();
        take(body, count);
        std::unique_lock lock(busy_);
        done_.wait(lock, [&] { return running_ == 0; });
    }

private:
    void take(const taskvec::function_ref<void(std::size_t)>& body, std::size_t count)
    {
        for (std::size_t i; (i = next_++) < count;) { body(i); }
    }
    void work()
    {
        std::uint64_t seen = 0;
        std::unique_lock lock(busy_);
        for (;;) {
            wake_.wait(lock, [&] { return over_ || turn_ != seen; });
            if (over_) { return; }
            seen = turn_;
            const auto* const body = body_;
            const std::size_t count = count_;
            lock.unlock();
            take(*body, count);
            lock.lock();
            if (--running_ == 0) { done_.notify_one(); }
        }
    }

    std::vector<std::thread> threads_;
    std::mutex busy_;
    std::condition_variable wake_, done_;
    const taskvec::function_ref<void(std::size_t)>* body_ = nullptr;
    std::atomic<std::size_t> next_{0};
    std::size_t count_ = 0, running_ = 0;
    std::uint64_t turn_ = 0;
    bool over_ = false;
};
// [end]

// [runtime]
class runtime {
public:
    explicit runtime(std::size_t bytes)
        : memory_(bytes)
        , pool_(2)
        , weights_(&memory_)
        , saved_(&memory_)
    {
        policy_.executor = [this](std::size_t count, const auto& body) { pool_.run(count, body); };
        policy_.memory = &memory_;
    }

    // Merges the tasks into weights of the runtime's own, and keeps of each task the tenth of what the merge lost that
    // is largest. Makes room for the words that a task replaces.
    void load(const taskvec::const_model_ref& base, std::span<const taskvec::const_model_ref> tasks)
    {
        std::size_t elements = 0;
        for (const auto& [name, tensor] : base) { elements += tensor.size(name); }
        weights_.resize(elements);
        float* place = weights_.data();
        for (const auto& [name, tensor] : base) {
            live_.insert(name, {place, taskvec::dtype::f32, tensor.shape});
            place += tensor.size(name);
        }
        deltas_ = taskvec::peru_fft(
            policy_, taskvec::task_arithmetic_options{.lambda = 0.3}, {.density = 0.1}, base, tasks, live_);
        std::size_t most = 0;
        for (const auto& delta : deltas_) {
            views_.push_back(taskvec::views(delta));
            most = std::max(most, taskvec::saved_bytes(views_.back(), live_));
        }
        saved_.resize(most / sizeof(double));
    }
    // Takes the task that is on out again, bit for bit, and puts another one on. Allocates nothing.
    void switch_to(std::size_t task)
    {
        switch_off();
        taskvec::apply(policy_, views_[task], live_, room_of(task));
        on_ = task;
    }
    void switch_off()
    {
        if (on_ == none) { return; }
        taskvec::undo(policy_, views_[on_], room_of(on_), live_);
        on_ = none;
    }
    [[nodiscard]] const taskvec::model_ref& model() const { return live_; }
    [[nodiscard]] std::span<const float> weights() const { return weights_; }
    [[nodiscard]] std::size_t memory_used() const { return memory_.used(); }

private:
    [[nodiscard]] std::span<std::byte> room_of(std::size_t task)
    {
        return std::as_writable_bytes(std::span(saved_)).first(taskvec::saved_bytes(views_[task], live_));
    }

    static constexpr std::size_t none = static_cast<std::size_t>(-1);
    arena memory_;
    thread_pool pool_;
    taskvec::cpu policy_;
    std::pmr::vector<float> weights_;
    std::pmr::vector<double> saved_; // of doubles: aligned to 8 bytes
    taskvec::model_ref live_;
    std::vector<taskvec::sparse_model> deltas_;
    std::vector<std::vector<taskvec::sparse_view>> views_;
    std::size_t on_ = none;
};
// [end]

// Tensors over one run of numbers: two matrices and a bias.
constexpr std::int64_t width = 256;
taskvec::const_model_ref model_of(const std::vector<float>& numbers)
{
    const float* const place = numbers.data();
    return {{"up.weight", {place, taskvec::dtype::f32, {width, width}}},
        {"down.weight", {place + width * width, taskvec::dtype::f32, {width, width}}},
        {"down.bias", {place + 2 * width * width, taskvec::dtype::f32, {width}}}};
}

} // namespace

int main()
{
    // A base and three models fine-tuned from it, of numbers that anyone can make again.
    std::uint32_t state = 1;
    const auto next = [&] { return static_cast<float>(state = state * 1664525u + 1013904223u) * 0x1p-31f - 1.0f; };
    std::vector<float> base(2 * width * width + width);
    for (float& x : base) { x = next(); }
    std::vector<std::vector<float>> tasks(3, base);
    std::vector<taskvec::const_model_ref> task_models;
    for (auto& task : tasks) {
        for (float& x : task) {
            const float much = next(), rarely = next();
            x += 0.01f * much * rarely;
        }
        task_models.push_back(model_of(task));
    }

    runtime served(std::size_t{16} << 20);
    served.load(model_of(base), task_models);
    const std::vector<float> merged(served.weights().begin(), served.weights().end());
    const auto distance = [&](const std::vector<float>& task) { // squared, of the weights that are served
        double sum = 0;
        for (const auto& [name, tensor] : model_of(task)) {
            const auto live = taskvec::flat_view<float>(*served.model().find(name), name);
            for (std::size_t i = 0; i < live.size(); ++i) {
                const double apart = live[i] - static_cast<const float*>(tensor.data)[i];
                sum += apart * apart;
            }
        }
        return sum;
    };

    std::vector<double> apart;
    for (const auto& task : tasks) { apart.push_back(distance(task)); }
    const std::size_t memory = served.memory_used();
    for (const std::size_t task : {0u, 1u, 2u, 0u}) {
        const std::size_t before = blocks_of_new;
        served.switch_to(task);
        const std::size_t blocks = blocks_of_new - before;
        std::printf("task %zu is on: %.0f%% of the merged model's distance to it is left; %zu blocks of operator new, "
                    "%zu bytes of the runtime's memory\n",
            task, 100 * distance(tasks[task]) / apart[task], blocks, served.memory_used() - memory);
    }
    served.switch_off();
    const auto now = served.weights();
    std::printf("the merged model is %s\n",
        std::equal(merged.begin(), merged.end(), now.begin()) ? "back, bit for bit" : "lost");
}
