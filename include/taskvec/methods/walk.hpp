// The walk that merges on the CPU: chunks on threads, blocks in kernels, results past the cache.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/byte_buffer.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/instruction_set.hpp>
#include <taskvec/core/random_words.hpp>
#include <taskvec/methods/entries.hpp>
#include <taskvec/methods/passes.hpp>
#include <taskvec/methods/row_pieces.hpp>
#include <taskvec/models/copy_through.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory_resource>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Outputs must not overlap inputs, except that a method which reads each element for the last time before it writes
/// it may work in place. What lies beside the models may never be overwritten.
inline void check_aliases(
    const aligned_models& models, tensor_sink& out, bool in_place, std::span<const companion> companions = {})
{
    struct range {
        const std::byte *begin, *end;
        std::size_t tensor;
    };
    call_vector<range> written;
    for (std::size_t i = 0; i < models.tensors().size(); ++i) {
        const auto& tensor = models.tensors()[i];
        if (auto* const begin = static_cast<const std::byte*>(out.direct(tensor.output)); begin && tensor.size > 0) {
            written.push_back({begin, begin + byte_count(tensor.output_dtype, tensor.size), i});
        }
    }
    if (written.empty()) { return; }
    std::sort(
        written.begin(), written.end(), [](const range& a, const range& b) { return std::less<>()(a.begin, b.begin); });
    for (std::size_t i = 1; i < written.size(); ++i) {
        if (std::less<>()(written[i].begin, written[i - 1].end)) {
            raise<invalid_argument>(error_code::alias_output,
                message("the outputs '", models.tensors()[written[i - 1].tensor].name, "' and '",
                    models.tensors()[written[i].tensor].name, "' share memory"));
        }
    }
    const auto check = [&](const std::byte* begin, std::size_t bytes, std::size_t index, bool replaceable) {
        if (!begin || bytes == 0) { return; }
        const std::byte* const end = begin + bytes;
        auto place = std::lower_bound(written.begin(), written.end(), begin,
            [](const range& r, const std::byte* p) { return !std::less<>()(p, r.end); });
        if (place == written.end() || !std::less<>()(place->begin, end)) { return; }
        const bool same = place->tensor == index && place->begin == begin && place->end == end;
        if (!same || !replaceable) {
            raise<invalid_argument>(error_code::alias_output,
                message("the output '", models.tensors()[place->tensor].name, "' shares memory with the input '",
                    models.tensors()[index].name,
                    "': this method cannot work in place there; give it memory of its own"));
        }
    };
    for (std::size_t i = 0; i < models.tensors().size(); ++i) {
        const auto& tensor = models.tensors()[i];
        const auto check_operand = [&](const aligned_tensor::operand& from) {
            if (!from.source) { check(from.data, byte_count(from.dtype, tensor.size), i, in_place); }
        };
        check_operand(tensor.base);
        for (const auto& task : tensor.tasks) { check_operand(task); }
    }
    for (const auto& beside : companions) { check(beside.data, beside.bytes, beside.tensor, false); }
}

/// What a method reads besides the models: operands in the order of tensors(), as many for each, in memory space
/// `space`.
template <class Options>
[[nodiscard]] auto operands_beside(const Options& options, const aligned_models& models, memory_space space)
{
    if constexpr (requires { method<Options>::beside(options, models, space); }) {
        return method<Options>::beside(options, models, space);
    }
    else {
        return call_vector<aligned_tensor::operand>();
    }
}

/// The storage types that a walk over models of some Types may read: all, where something lies beside the models.
template <class Options, class Types>
using read_types = std::conditional_t<requires(const Options& options, const aligned_models& models) {
    method<Options>::beside(options, models, memory_space::host);
}, storage_types, Types>;

/// What lies beside the models as memory that may not be overwritten: operands, or what a method says that has other
/// data.
template <class Options>
[[nodiscard]] auto companions_of(const Options& options, const aligned_models& models, memory_space space,
    std::span<const aligned_tensor::operand> beside)
{
    if constexpr (requires { method<Options>::companions(options, models, space); }) {
        return method<Options>::companions(options, models, space);
    }
    else {
        call_vector<companion> companions;
        for (std::size_t i = 0; i < beside.size(); ++i) {
            const std::size_t tensor = i / (beside.size() / models.tensors().size());
            companions.push_back({tensor, beside[i].data, byte_count(beside[i].dtype, models.tensors()[tensor].size)});
        }
        return companions;
    }
}

/// Stores merged rows as the output's dtype, in place where the sink has memory, otherwise chunk by chunk.
class row_writer {
public:
    row_writer(tensor_sink& out, bool stream, std::pmr::memory_resource* memory, storage_conversions conversions)
        : out_(&out)
        , conversions_(conversions)
        , stream_(stream)
        , buffer_(memory)
    { }

    void open(const aligned_tensor& tensor, const tensor_chunk& piece)
    {
        tensor_ = &tensor;
        piece_ = &piece;
        direct_ = static_cast<std::byte*>(out_->direct(tensor.output));
        bounded_ = 0;
        const std::size_t needed = byte_count(tensor.output_dtype, direct_ ? block_size : piece.size);
        if (buffer_.size() < needed) { buffer_.resize(needed); }
    }
    template <arithmetic_element A>
    void write(std::uint64_t offset, const A* values, std::size_t n)
    {
        const dtype type = tensor_->output_dtype;
        const std::size_t width = bits_per_element(type) / 8;
        const auto& conversion = conversions_.get<A>().of(type, tensor_->name, true);
        if (!direct_) {
            conversion.narrow(values, buffer_.data() + (offset - piece_->offset) * width, n);
            return;
        }
        const void* stored = values;
        if (type != dtype_of<A>) {
            conversion.narrow(values, buffer_.data(), n);
            stored = buffer_.data();
        }
        put(offset * width, stored, n * width);
    }
    /// Whether the output is stored as T; and stored words of T, at `offset` of the tensor.
    template <storage_element T>
    [[nodiscard]] bool stores() const noexcept
    {
        return tensor_->output_dtype == dtype_of<T>;
    }
    template <storage_element T>
    void write_words(std::uint64_t offset, const storage_word<T>* words, std::size_t n)
    {
        if (!direct_) { std::memcpy(buffer_.data() + (offset - piece_->offset) * sizeof(T), words, n * sizeof(T)); }
        else {
            put(offset * sizeof(T), words, n * sizeof(T));
        }
    }
    /// Tells that n entries come of numbers whose largest magnitude has these bits.
    template <arithmetic_element A>
    void came_of(bits_type<A> largest, std::size_t n) noexcept
    {
        if (largest < magnitude_bits(static_cast<A>(0x1p64))) { bounded_ += n; }
    }
    void close()
    {
        if (direct_) {
            if (stream_) { kernels::stream_fence(); }
            return;
        }
        const std::size_t width = bits_per_element(tensor_->output_dtype) / 8;
        const dtype type = tensor_->output_dtype;
        const bool wide_exponent = type == dtype::f32 || type == dtype::bf16 || type == dtype::f64;
        if (wide_exponent && bounded_ == piece_->size) {
            out_->write_bounded(tensor_->output, piece_->offset * width, buffer_.data(), piece_->size * width);
        }
        else {
            out_->write(tensor_->output, piece_->offset * width, buffer_.data(), piece_->size * width);
        }
    }

private:
    void put(std::uint64_t at, const void* from, std::size_t bytes) const
    {
        if (stream_) { kernels::stream_copy(direct_ + at, from, bytes); }
        else {
            std::memcpy(direct_ + at, from, bytes);
        }
    }

    tensor_sink* out_;
    storage_conversions conversions_;
    bool stream_;
    byte_buffer buffer_;
    const aligned_tensor* tensor_ = nullptr;
    const tensor_chunk* piece_ = nullptr;
    std::byte* direct_ = nullptr;
    std::size_t bounded_ = 0; // entries of the chunk that came_of() told of
};

/// Bytes of stored words that a kernel makes before they leave the first-level cache.
inline constexpr std::size_t made_bytes = 4096;

/// What one worker of a merge needs beside its block.
struct merge_scratch {
    explicit merge_scratch(std::pmr::memory_resource* memory)
        : tasks(memory)
        , beside(memory)
        , draws(memory)
        , words(memory)
        , numbers(memory)
        , lanes(memory)
        , weighed(memory)
        , piece_rows(memory)
    { }
    std::pmr::vector<const void*> tasks, beside, draws;
    std::pmr::vector<std::int64_t> words; ///< behind draws: for each task, a block of signed words
    std::pmr::vector<double> numbers; ///< behind beside, where it is not read in place
    std::pmr::vector<std::int32_t> lanes; ///< counts of tasks
    piece_memory weighed, piece_rows; ///< of methods that look at rows: what they made of a piece, and what they need
    const void* weighed_rows = nullptr;
    tensor_chunk piece{};
    alignas(64) std::byte made[made_bytes];
};

/// Whether a method looks at whole rows before their entries are merged: see elementwise_method.
template <class Method>
concept looks_at_rows = requires(const Method& m) { m.pieces(); };

/// What a walk goes over: chunks, or pieces of whole rows.
template <class Method>
[[nodiscard]] decltype(auto) walked_pieces(const Method& prepared, const aligned_models& models)
{
    if constexpr (looks_at_rows<Method>) { return prepared.pieces(); }
    else {
        return models.chunks();
    }
}

/// Calls use(body) with the body of a tensor: a method has one, or chooses between several.
template <arithmetic_element A, class Method, class Use>
decltype(auto) visit_body(const Method& prepared, std::size_t tensor, Use&& use)
{
    if constexpr (requires { prepared.template with_body<A>(tensor, use); }) {
        return prepared.template with_body<A>(tensor, use);
    }
    else {
        return use(prepared.template body<A>(tensor));
    }
}

/// The words of a stream for entries [offset, offset + n) of a tensor, less 2³¹, in the order in which kernels of T
/// take them (entry_run::draws). Blocks start at multiples of 64, and there is room for a whole one.
template <storage_element T>
void fill_draws(
    const random_stream& stream, std::uint64_t offset, signed_word<arithmetic_type<T>>* words, std::size_t n)
{
    if constexpr (std::same_as<arithmetic_type<T>, double>) {
        for (std::size_t i = 0; i < n; i += 4) {
            const auto four = stream.words((offset + i) / 4);
            for (std::size_t j = 0; j < 4; ++j) { words[i + j] = std::int64_t{four[j]} - (std::int64_t{1} << 31); }
        }
    }
    else {
        constexpr auto order = sizeof(T) == sizeof(float) ? word_order::in_sequence : word_order::halves;
        random_words<order>(stream, offset / 4, (n + 3) / 4, words, block_size / 2);
    }
}

/// Tallies of nothing, that count in memory of `memory`.
[[nodiscard]] inline std::pmr::vector<merge_tally> empty_tallies(std::size_t count, std::pmr::memory_resource* memory)
{
    std::pmr::vector<merge_tally> tallies(memory);
    tallies.reserve(count);
    for (std::size_t i = 0; i < count; ++i) { tallies.emplace_back(memory); }
    return tallies;
}

/// What the counts of tasks say in a report.
inline void report_tally(const merge_tally& tally, std::size_t tasks, merge_report& report)
{
    const auto slot = [&](std::size_t k, std::vector<std::uint64_t>& to) {
        if (tally.of_tasks.size() < (k + 1) * tasks) { return; }
        const auto first = tally.of_tasks.begin() + static_cast<std::ptrdiff_t>(k * tasks);
        to.assign(first, first + static_cast<std::ptrdiff_t>(tasks));
    };
    slot(0, report.kept);
    slot(1, report.conflicting);
}

/// Runs the kernel that is compiled for just as many tasks as there are; false where there is none.
template <storage_element T, int... number, class Body>
bool run_held(std::integer_sequence<int, number...>, const Body& body, const kernels::entry_run<T>& run,
    std::size_t task_slots, kernels::run_findings<arithmetic_type<T>>& findings)
{
    return ((run.task_count == number ? (kernels::run_widest(kernels::merge_kernel<T, number, Body>{
                                             body, run, findings, nullptr, task_slots}),
                                            true)
                                      : false)
        || ...);
}

/// Calls the kernel of a body for as many tasks as there are: compiled for a few numbers, or for any.
template <storage_element T, class Body>
void run_kernel(const Body& body, const kernels::entry_run<T>& run, std::int32_t* lanes, std::size_t task_slots,
    kernels::run_findings<arithmetic_type<T>>& findings)
{
    constexpr std::size_t line = kernels::merge_kernel<T, 0, Body>::line;
    const std::size_t whole = current_instruction_set() == instruction_set::scalar ? 0 : run.size / line * line;
    if (whole > 0) {
        kernels::entry_run<T> lines = run;
        lines.size = whole;
        bool done = false;
        // The types that models are mostly stored as.
        if constexpr (requires { Body::held; } && (std::same_as<T, float> || std::same_as<T, bf16>)) {
            if (!lanes) { done = run_held<T>(Body::held, body, lines, task_slots, findings); }
        }
        if (!done) { kernels::run_widest(kernels::merge_kernel<T, 0, Body>{body, lines, findings, lanes, task_slots}); }
    }
    if (whole < run.size) {
        kernels::entry_run<T> rest = run;
        rest.first += whole;
        rest.size -= whole;
        rest.out += whole;
        kernels::run_scalar(kernels::merge_kernel<T, 0, Body>{body, rest, findings, lanes, task_slots});
    }
}

/// Merges the entries of an opened block that `run` points to, and writes the words of T where take(first, words,
/// count) puts them.
template <storage_element T, class Body, class Take>
void run_body(const Body& body, kernels::entry_run<T> run, merge_scratch& scratch, std::size_t task_slots,
    kernels::run_findings<arithmetic_type<T>>& findings, const Take& take)
{
    std::int32_t* lanes = nullptr;
    if (task_slots > 0) {
        findings.tally->of_tasks.resize(task_slots * run.task_count);
        scratch.lanes.assign(task_slots * run.task_count * 16 + 16, 0);
        const auto place = reinterpret_cast<std::uintptr_t>(scratch.lanes.data());
        lanes = scratch.lanes.data() + (64 - place % 64) % 64 / sizeof(std::int32_t);
    }
    constexpr std::size_t group = made_bytes / sizeof(T);
    auto* const made = reinterpret_cast<storage_word<T>*>(scratch.made);
    const std::size_t n = run.size;
    const std::uint64_t place = run.place;
    for (std::size_t begin = 0; begin < n; begin += group) {
        const std::size_t end = std::min(n, begin + group);
        for (std::size_t at = begin; at < end;) {
            std::size_t until = end;
            if constexpr (requires { body.constant_until(place, place); }) {
                until = static_cast<std::size_t>(body.constant_until(place + at, place + end) - place);
            }
            run.first = at;
            run.size = until - at;
            run.place = place + at;
            run.out = made + (at - begin);
            run_kernel<T>(body, run, lanes, task_slots, findings);
            at = until;
        }
        take(begin, made, end - begin);
    }
}

/// Reports what may not lie beside the models: NaN and infinity, and where the method says so what is negative.
template <class Method, arithmetic_element A>
void examine_beside(
    const Method& prepared, const row_block<A>& rows, std::size_t b, const A* values, bits_type<A> largest)
{
    const bool wrong = largest >= exponent_mask<A> && rows.models().options().on_nonfinite == nonfinite::error;
    bool negative = false;
    if constexpr (requires { Method::beside_not_negative; }) {
        negative = kernels::any_below(values, A{0}, rows.size());
    }
    if (!wrong && !negative) { return; }
    for (std::size_t i = 0; i < rows.size(); ++i) {
        if (wrong ? !std::isfinite(values[i]) : values[i] < 0) {
            prepared.refuse_beside(
                rows.models(), rows.tensor_index(), b, static_cast<double>(values[i]), rows.offset() + i);
        }
    }
}

/// Merges an opened block by a body, and writes it: from stored words to stored words where everything is stored as one
/// type, otherwise through rows of the arithmetic type. (A class, as nvcc's front end fails on the lambdas that would
/// do.)
template <class Method, class Body, class Passes, arithmetic_element A>
class block_merge {
    static constexpr bool with_beside = requires { Body::reads_beside; };
    static constexpr bool with_draws = requires(const Body& body) { body.stream(std::size_t{}); };

public:
    block_merge(const Method& prepared, const Body& body, const Passes& passes, row_block<A>& rows, row_writer& writer,
        merge_scratch& scratch, std::size_t task_slots, merge_tally& tally)
        : body_(body)
        , rows_(rows)
        , writer_(writer)
        , scratch_(scratch)
        , task_slots_(task_slots)
        , findings_{&tally, 0}
    {
        if constexpr (with_beside) { read_beside(prepared, passes); }
    }

    void run()
    {
        bool done = false;
        // Rows of numbers do not come apart as the halves of 16-bit types do.
        if constexpr (!with_beside) { done = any_stored(storage_of<Passes>{}); }
        if (!done && !stored<A>()) { through_rows(); }
        rows_.note(findings_.largest);
        writer_.template came_of<A>(rows_.largest(), rows_.size());
    }

private:
    void read_beside(const Method& prepared, const Passes& passes)
    {
        if constexpr (looks_at_rows<Method>) {
            const A* const made =
                static_cast<const A*>(scratch_.weighed_rows) + (rows_.offset() - scratch_.piece.offset);
            scratch_.beside.resize(prepared.row_numbers());
            for (std::size_t b = 0; b < scratch_.beside.size(); ++b) {
                scratch_.beside[b] = made + b * scratch_.piece.size;
            }
        }
        else {
            scratch_.beside.resize(passes.beside_each());
            scratch_.numbers.resize(scratch_.beside.size() * block_size);
            for (std::size_t b = 0; b < scratch_.beside.size(); ++b) {
                const auto& from = passes.beside(rows_.tensor_index(), b);
                scratch_.beside[b] = nullptr;
                if (!from.data) { continue; }
                bits_type<A> largest = 0;
                const A* const values =
                    rows_.beside(from, reinterpret_cast<A*>(scratch_.numbers.data() + b * block_size), largest);
                scratch_.beside[b] = values;
                examine_beside(prepared, rows_, b, values, largest);
            }
        }
    }
    template <storage_element T>
    void draw()
    {
        const std::size_t tasks = rows_.task_count();
        scratch_.draws.resize(tasks);
        scratch_.words.resize(tasks * block_size);
        for (std::size_t t = 0; t < tasks; ++t) {
            auto* const words = reinterpret_cast<signed_word<A>*>(scratch_.words.data() + t * block_size);
            scratch_.draws[t] = words;
            if (body_.drawing()) { fill_draws<T>(body_.stream(t), rows_.offset(), words, rows_.size()); }
        }
    }
    template <storage_element T>
    [[nodiscard]] kernels::entry_run<T> run_of(const storage_word<T>* base)
    {
        if constexpr (with_draws) { draw<T>(); }
        kernels::entry_run<T> run;
        run.base = base;
        run.tasks = scratch_.tasks.data();
        run.task_count = rows_.task_count();
        run.beside = scratch_.beside.data();
        run.draws = scratch_.draws.data();
        run.half_of_draws = block_size / 2;
        run.size = rows_.size();
        run.place = rows_.position();
        return run;
    }
    /// Where everything is stored as T; false, and nothing done, otherwise.
    template <storage_element T>
    bool stored()
    {
        const storage_word<T>* base = nullptr;
        if (!writer_.template stores<T>() || !rows_.template stored<T>(base, scratch_.tasks)) { return false; }
        run_body<T>(body_, run_of<T>(base), scratch_, task_slots_, findings_,
            [this](std::size_t first, const storage_word<T>* words, std::size_t n) {
                writer_.template write_words<T>(rows_.offset() + first, words, n);
            });
        return true;
    }
    /// The same for the narrow types of a list, in their order until one is it.
    template <class... T>
    bool any_stored(storage_list<T...>)
    {
        return (narrow_stored<T>() || ...);
    }
    template <storage_element T>
    bool narrow_stored()
    {
        if constexpr (std::same_as<arithmetic_type<T>, A> && !std::same_as<T, A> && has_pack_conversion<T>) {
            return stored<T>();
        }
        else {
            return false;
        }
    }
    void through_rows()
    {
        const std::size_t tasks = rows_.task_count();
        const A* const base = rows_.tensor().base.data ? rows_.base() : nullptr;
        scratch_.tasks.resize(tasks);
        for (std::size_t t = 0; t < tasks; ++t) { scratch_.tasks[t] = rows_.task(t); }
        A* const merged = rows_.scratch(0);
        run_body<A>(body_, run_of<A>(base), scratch_, task_slots_, findings_,
            [merged](std::size_t first, const A* words, std::size_t n) {
                std::memcpy(merged + first, words, n * sizeof(A));
            });
        writer_.write(rows_.offset(), merged, rows_.size());
    }

    const Body& body_;
    row_block<A>& rows_;
    row_writer& writer_;
    merge_scratch& scratch_;
    std::size_t task_slots_;
    kernels::run_findings<A> findings_;
};

/// Outputs larger than this do not stay in the cache: they are written past it.
inline constexpr std::uint64_t streaming_bytes = std::uint64_t{8} << 20;

/// Merges the given chunks with a prepared method. tallies[i] receives what chunk chunks[i] said.
template <class Options, class Passes>
void merge_chunks(const Passes& passes, const method<Options>& prepared, std::span<const std::size_t> chunks,
    tensor_sink& out, std::span<merge_tally> tallies, std::string_view phase)
{
    const cpu& policy = passes.policy();
    const aligned_models& models = passes.models();
    std::uint64_t written = 0;
    for (const auto& tensor : models.tensors()) { written += byte_count(tensor.output_dtype, tensor.size); }
    std::size_t scratch_rows = 1;
    if constexpr (row_method<Options>) { scratch_rows += method<Options>::scratch_rows; }
    using types = read_types<Options, storage_of<Passes>>;
    auto workspaces = make_workspaces<types>(policy, models, chunks.size(), scratch_rows);
    std::pmr::vector<row_writer> writers(memory_of(policy));
    std::pmr::vector<merge_scratch> scratch(memory_of(policy));
    writers.reserve(workspaces.size());
    scratch.reserve(workspaces.size());
    for (std::size_t w = 0; w < workspaces.size(); ++w) {
        writers.emplace_back(out, written > streaming_bytes, memory_of(policy), storage_conversions::of(types{}));
        scratch.emplace_back(memory_of(policy));
    }
    const std::size_t task_slots = models.options().statistics ? method<Options>::task_slots : 0;
    std::uint64_t bytes = 0;
    const auto& pieces = walked_pieces(prepared, models);
    for (const std::size_t c : chunks) { bytes += models.bytes(pieces[c]); }
    progress_meter meter(policy, phase, bytes);
    for_each_index(policy, chunks.size(), [&](std::size_t index, std::size_t worker) {
        const tensor_chunk& piece = pieces[chunks[index]];
        const aligned_tensor& tensor = models.tensors()[piece.tensor];
        row_writer& writer = writers[worker];
        writer.open(tensor, piece);
        with_block_of<storage_of<Passes>>(workspaces[worker], tensor, [&]<class A>(row_block<A>& rows) {
            if constexpr (packed_method<Options>) {
                if constexpr (looks_at_rows<method<Options>>) {
                    merge_scratch& own = scratch[worker];
                    A* const made = own.weighed.rows<A>(prepared.row_numbers(), piece.size);
                    prepared.weigh(rows, piece, made, own.piece_rows);
                    own.weighed_rows = made;
                    own.piece = piece;
                }
                visit_body<A>(prepared, piece.tensor, [&](const auto& body) {
                    for_each_block_of(rows, piece, [&](row_block<A>& opened) {
                        block_merge(prepared, body, passes, opened, writer, scratch[worker], task_slots, tallies[index])
                            .run();
                    });
                });
            }
            else {
                for_each_block_of(rows, piece, [&](row_block<A>& opened) {
                    A* const merged = opened.scratch(0);
                    prepared(opened, merged, tallies[index]);
                    writer.write(opened.offset(), merged, opened.size());
                });
            }
        });
        writer.close();
        if (!meter.advance(models.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
    });
}

/// The walk of a method, and a second one over what has to be merged again.
template <class Options, class Passes>
void merge_walk(const Passes& passes, method<Options>& prepared, tensor_sink& out, merge_report& report)
{
    const aligned_models& models = passes.models();
    std::pmr::memory_resource* const memory = memory_of(passes.policy());
    const auto& pieces = walked_pieces(prepared, models);
    constexpr bool settles = requires(std::span<const merge_tally> t) { prepared.settle(t); };
    std::pmr::vector<std::size_t> all(memory), wanted(memory);
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        if (settles) { all.push_back(i); }
        if (out.wants(models.tensors()[pieces[i].tensor].output)) { wanted.push_back(i); }
    }
    const auto& chunks = settles ? all : wanted; // what is not wanted has a say in what is settled
    auto tallies = empty_tallies(chunks.size(), memory);
    discarding_sink nowhere;
    const bool twice = settles && !out.rewritable();
    merge_chunks<Options>(passes, prepared, chunks, twice ? nowhere : out, tallies, twice ? "settle" : "merge");
    if constexpr (settles) {
        auto of_tensors = empty_tallies(models.tensors().size(), memory);
        for (std::size_t c = 0; c < tallies.size(); ++c) { of_tensors[pieces[c].tensor] += tallies[c]; }
        const bool settled = prepared.settle(std::span<const merge_tally>(of_tensors));
        if (twice) {
            tallies = empty_tallies(wanted.size(), memory);
            merge_chunks<Options>(passes, prepared, wanted, out, tallies, "merge");
        }
        else if (settled) {
            std::pmr::vector<std::size_t> again(memory);
            for (std::size_t c = 0; c < tallies.size(); ++c) {
                if (prepared.again(pieces[c].tensor, tallies[c])) { again.push_back(c); }
            }
            auto redone = empty_tallies(again.size(), memory);
            merge_chunks<Options>(passes, prepared, again, out, redone, "settle");
            for (std::size_t i = 0; i < again.size(); ++i) { tallies[again[i]] = std::move(redone[i]); }
        }
    }
    merge_tally total(memory);
    for (const auto& tally : tallies) { total += tally; }
    report_tally(total, models.task_count(), report);
}

} // namespace taskvec::inline TASKVEC_ABI::detail
