// Statistics on disk: what Fisher merging and RegMean need to know of a task's data, as plain safetensors files.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/formats/safetensors.hpp>
#include <taskvec/models/weight_layout.hpp>
#include <taskvec/statistics/fisher_accumulator.hpp>
#include <taskvec/statistics/gram_accumulator.hpp>
#include <taskvec/statistics/stored_gram.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The value of the metadata key `schema` that this version writes and reads.
inline constexpr std::string_view statistics_schema = "taskvec.statistics.1";

/// What a statistics file holds.
enum class statistics_kind : std::uint8_t { empirical_fisher, expected_fisher, gram };

/// The word that files have for a kind.
[[nodiscard]] constexpr std::string_view to_string(statistics_kind kind) noexcept
{
    return kind == statistics_kind::gram            ? "gram"
        : kind == statistics_kind::empirical_fisher ? "empirical_fisher"
                                                    : "expected_fisher";
}

/// What a statistics file says about itself.
struct statistics_info {
    statistics_kind kind = statistics_kind::empirical_fisher; ///< what the tensors are
    std::uint64_t examples = 0; ///< how many the statistics come from; of Grams, the rows of the layer that saw most
    std::optional<std::uint64_t> fingerprint{}; ///< of the model that they were collected with
    std::vector<std::string> in_out{}; ///< Grams: the weights that are stored in×out (Conv1D); all others are out×in
    metadata_map metadata{}; ///< further keys to write; on reading, all keys of the file
};

/// Writes statistics. Each tensor has the name of the parameter that it belongs to: a Fisher also its shape, a Gram
/// in×in. Metadata: `schema` "taskvec.statistics.1", `kind` "empirical_fisher", "expected_fisher" or "gram",
/// `examples`, and where known `fingerprint` of the model (see fingerprint()); for Grams of weights that are stored
/// in×out their names, as a JSON list, under `in_out`. Throws invalid_argument, io_error. Written atomically.
inline void write_statistics(const std::filesystem::path& path, const const_model_ref& tensors,
    const statistics_info& info, durability mode = durability::synchronised);

namespace detail {

inline metadata_map statistics_metadata(const statistics_info& info)
{
    metadata_map metadata = info.metadata;
    metadata["schema"] = statistics_schema;
    metadata["kind"] = to_string(info.kind);
    metadata["examples"] = std::to_string(info.examples);
    metadata.erase("fingerprint");
    metadata.erase("in_out");
    if (info.fingerprint) { metadata["fingerprint"] = fingerprint_text(*info.fingerprint); }
    if (!info.in_out.empty()) { metadata["in_out"] = nlohmann::json(info.in_out).dump(); }
    return metadata;
}

/// Writes f64 values as another storage type.
inline void write_narrowed(
    safetensors_writer& writer, std::size_t index, std::uint64_t element, dtype type, std::span<const double> values)
{
    visit_storage(type, "statistics", [&]<class T>(std::type_identity<T>) {
        std::vector<T> stored(values.size());
        kernels::narrow(values.data(), stored.data(), values.size());
        writer.write(index, element * sizeof(T), stored.data(), stored.size() * sizeof(T));
    });
}

/// `count` elements of a tensor from `first` on, in f64.
inline std::vector<double> read_widened(const const_tensor_ref& tensor, std::uint64_t first, std::size_t count)
{
    std::vector<double> raw(block_size), values(count);
    const aligned_tensor::operand from{static_cast<const std::byte*>(tensor.data), tensor.dtype};
    for (std::size_t at = 0; at < count; at += block_size) {
        const std::size_t n = std::min(block_size, count - at);
        with_elements(from, first + at, n, reinterpret_cast<std::byte*>(raw.data()),
            [&](const auto* stored) { (void)kernels::widen(stored, values.data() + at, n); });
    }
    return values;
}

} // namespace detail

inline void write_statistics(
    const std::filesystem::path& path, const const_model_ref& tensors, const statistics_info& info, durability mode)
{
    for (const auto& [label, tensor] : tensors) {
        if (!is_storage(tensor.dtype)) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("statistics of '", label, "' have dtype ", to_string(tensor.dtype), "; expected ",
                    storage_names()));
        }
        if (info.kind == statistics_kind::gram && (tensor.shape.size() != 2 || tensor.shape[0] != tensor.shape[1])) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("the Gram matrix of '", label, "' has shape ", to_string(tensor.shape), "; expected a square"));
        }
    }
    write_safetensors(path, tensors, detail::statistics_metadata(info), mode);
}

/// Writes the Fisher that an accumulator has built, in `storage`.
///
///     write_statistics("a.fisher.safetensors", fisher, fingerprint(cpu{}, model));
inline void write_statistics(const std::filesystem::path& path, const fisher_accumulator& fisher, statistics_kind kind,
    std::optional<std::uint64_t> model = {}, dtype storage = dtype::f32, durability mode = durability::synchronised)
{
    if (kind == statistics_kind::gram) {
        raise<invalid_argument>(error_code::statistics_kind, "a Fisher accumulator holds no Gram matrices");
    }
    if (fisher.examples() == 0) {
        raise<invalid_argument>(
            error_code::inputs_empty, "no example was given: the Fisher information is a mean over examples");
    }
    std::vector<tensor_spec> specs;
    for (const auto& parameter : fisher.parameters()) { specs.push_back({parameter.name, storage, parameter.shape}); }
    safetensors_writer writer(path, specs,
        detail::statistics_metadata(
            {.kind = kind, .examples = fisher.examples(), .fingerprint = model, .in_out = {}, .metadata = {}}),
        mode);
    for (std::size_t i = 0; i < specs.size(); ++i) { detail::write_narrowed(writer, i, 0, storage, fisher.fisher(i)); }
    writer.commit();
}
inline void write_statistics(const std::filesystem::path& path, const empirical_fisher_accumulator& fisher,
    std::optional<std::uint64_t> model = {}, dtype storage = dtype::f32, durability mode = durability::synchronised)
{
    write_statistics(path, fisher, statistics_kind::empirical_fisher, model, storage, mode);
}
inline void write_statistics(const std::filesystem::path& path, const expected_fisher_accumulator& fisher,
    std::optional<std::uint64_t> model = {}, dtype storage = dtype::f32, durability mode = durability::synchronised)
{
    write_statistics(path, fisher, statistics_kind::expected_fisher, model, storage, mode);
}

/// Writes the Grams of a model's layers, by the names of their weights. `in_out` names those stored in×out. f64 by
/// default: what f32 rounds away decides where inputs are nearly dependent.
///
///     const auto of = fingerprint(cpu{}, model);
///     write_statistics("a.gram.safetensors", {{"fc1.weight", gram1}, {"fc2.weight", gram2}}, of);
inline void write_statistics(const std::filesystem::path& path, const std::map<std::string, gram_accumulator>& grams,
    std::optional<std::uint64_t> model = {}, std::vector<std::string> in_out = {}, dtype storage = dtype::f64,
    durability mode = durability::synchronised)
{
    statistics_info info{.kind = statistics_kind::gram,
        .examples = 0,
        .fingerprint = model,
        .in_out = std::move(in_out),
        .metadata = {}};
    std::vector<tensor_spec> specs;
    for (const auto& [label, gram] : grams) {
        const auto n = static_cast<std::int64_t>(gram.features());
        specs.push_back({label, storage, {n, n}});
        info.examples = std::max(info.examples, gram.examples());
    }
    for (const auto& label : info.in_out) {
        if (!grams.contains(label)) {
            raise<invalid_argument>(error_code::tensor_missing,
                message("'", label, "' is said to be stored in×out, and has no Gram matrix here"));
        }
    }
    safetensors_writer writer(path, specs, detail::statistics_metadata(info), mode);
    std::size_t index = 0;
    for (const auto& [label, gram] : grams) {
        std::vector<double> row(gram.features());
        for (std::size_t i = 0; i < row.size(); ++i) {
            for (std::size_t j = 0; j < row.size(); ++j) { row[j] = gram(i, j); }
            detail::write_narrowed(writer, index, i * row.size(), storage, row);
        }
        ++index;
    }
    writer.commit();
}

/// A statistics file, mapped: views into it live as long as this object. A safetensors file without our metadata is
/// taken as it is: then described() is false, and neither its kind nor its model can be checked. Throws format_error
/// for metadata or tensors that break the format, io_error. Cost: O(header); merges check the values that they read.
///
///     const statistics_file fisher("a.fisher.safetensors");
///     fisher.require_fisher();
///     check_statistics(cpu{}, fisher, model, "a.safetensors");
class statistics_file {
public:
    /// Maps and checks the file.
    explicit statistics_file(const std::filesystem::path& path)
        : file_(path)
        , model_(file_.model())
    {
        info_.metadata = file_.metadata();
        const auto value = [&](const char* key) -> const std::string* {
            const auto place = info_.metadata.find(key);
            return place == info_.metadata.end() ? nullptr : &place->second;
        };
        for (const auto& [label, tensor] : model_) {
            if (!is_storage(tensor.dtype)) {
                fail(message(
                    "holds '", label, "' of dtype ", to_string(tensor.dtype), "; statistics are ", storage_names()));
            }
        }
        const auto* const schema = value("schema");
        if (!schema) { return; }
        if (*schema != statistics_schema) {
            fail(message("has schema '", *schema, "'; this version reads '", statistics_schema, "'"));
        }
        described_ = true;
        const auto* const kind = value("kind");
        bool known_kind = false;
        for (const auto known :
            {statistics_kind::empirical_fisher, statistics_kind::expected_fisher, statistics_kind::gram}) {
            if (kind && *kind == to_string(known)) {
                info_.kind = known;
                known_kind = true;
            }
        }
        if (!known_kind) {
            fail(message(
                "has kind '", kind ? *kind : std::string(), "'; expected empirical_fisher, expected_fisher or gram"));
        }
        const auto* const examples = value("examples");
        bool counted = false;
        if (examples) {
            const char* const end = examples->data() + examples->size();
            const auto [stopped, wrong] = std::from_chars(examples->data(), end, info_.examples);
            counted = stopped == end && wrong == std::errc();
        }
        if (!counted) {
            fail(message(
                "has examples '", examples ? *examples : std::string(), "'; expected a count of at most 2^64-1"));
        }
        if (const auto* const stamp = value("fingerprint")) {
            info_.fingerprint = parse_fingerprint(*stamp);
            if (!info_.fingerprint) {
                fail(message("has the fingerprint '", *stamp, "'; expected 'xxh64:' and 16 hexadecimal digits"));
            }
        }
        if (info_.kind != statistics_kind::gram) { return; }
        for (const auto& [label, tensor] : model_) {
            if (tensor.shape.size() != 2 || tensor.shape[0] != tensor.shape[1]) {
                fail(message("holds '", label, "' of shape ", to_string(tensor.shape), "; a Gram matrix is square"));
            }
        }
        if (const auto* const list = value("in_out")) {
            const auto json = parse_json(*list, path.string());
            bool good = json.is_array();
            for (const auto& entry : json) {
                good = good && entry.is_string() && model_.find(entry.get_ref<const std::string&>());
            }
            if (!good) { fail("has an in_out that is no list of its tensors' names"); }
            for (const auto& entry : json) { info_.in_out.push_back(entry.get<std::string>()); }
        }
    }

    /// The file's path.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return file_.path(); }
    /// The file's path.
    [[nodiscard]] std::filesystem::path path() && { return file_.path(); }
    /// The file itself.
    [[nodiscard]] const safetensors_file& file() const& noexcept { return file_; }
    void file() const&& = delete; // name the owner first: its views would dangle
    /// The statistics by name of the model's tensors.
    [[nodiscard]] const const_model_ref& model() const& noexcept { return model_; }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// Whether the file says what it holds; info() means something only then.
    [[nodiscard]] bool described() const noexcept { return described_; }
    /// What the file says about itself.
    [[nodiscard]] const statistics_info& info() const& noexcept { return info_; }
    /// What the file says about itself.
    [[nodiscard]] statistics_info info() && { return std::move(info_); }
    /// How the weight of this name is stored, as the file says; out_in if it says nothing.
    [[nodiscard]] weight_layout layout(std::string_view label) const
    {
        return std::find(info_.in_out.begin(), info_.in_out.end(), label) != info_.in_out.end() ? weight_layout::in_out
                                                                                                : weight_layout::out_in;
    }

    /// Throws invalid_argument if the file says that it holds something else.
    void require_fisher() const { require(info_.kind != statistics_kind::gram, "a diagonal Fisher"); }
    /// The same for Gram matrices.
    void require_gram() const { require(info_.kind == statistics_kind::gram, "Gram matrices"); }

private:
    [[noreturn]] void fail(const std::string& what) const
    {
        raise<format_error>(error_code::statistics_format, what, file_.path().string());
    }
    void require(bool right, std::string_view wanted) const
    {
        if (described_ && !right) {
            raise<invalid_argument>(error_code::statistics_kind,
                message("'", path().string(), "' holds ", to_string(info_.kind), "; expected ", wanted));
        }
    }

    safetensors_file file_;
    const_model_ref model_;
    statistics_info info_;
    bool described_ = false;
};

/// Throws invalid_argument if the file names another model than this one. Cost: one read of the model's bytes.
inline void check_statistics(const cpu& policy, const statistics_file& file, const const_model_ref& model,
    std::string_view model_name = "the model")
{
    if (!file.described() || !file.info().fingerprint) { return; }
    if (const auto found = fingerprint(policy, model); found != *file.info().fingerprint) {
        raise<invalid_argument>(error_code::fingerprint_differs,
            message("'", file.path().string(), "' holds the statistics of another model than '", model_name,
                "': its fingerprint is ", fingerprint_text(*file.info().fingerprint), "; expected ",
                fingerprint_text(found)));
    }
}

namespace detail {

/// Throws invalid_argument or nonfinite_error unless every tensor of a file of Grams is one. Cost: one read of both
/// halves.
inline void check_grams(const statistics_file& file)
{
    std::vector<double> memory(2 * stored_gram::tile * stored_gram::tile), raw(block_size), diagonal;
    for (const auto& [label, tensor] : file.model()) {
        const auto n = static_cast<std::size_t>(tensor.shape[0]);
        diagonal.resize(std::max(diagonal.size(), n));
        const auto where = [&file, &label = label] {
            return message("the Gram matrix of '", label, "' in '", file.path().string(), "'");
        };
        const stored_gram gram(
            {static_cast<const std::byte*>(tensor.data), tensor.dtype}, n, where, diagonal, raw.data());
        for (std::size_t row = 0; row < gram.tile_rows(); ++row) {
            gram.for_each_entry(row, memory.data(), raw.data(), [](std::size_t, std::size_t, double) { });
        }
    }
}

/// Throws nonfinite_error if a total of finite parts is beyond what it will be stored as.
inline void check_total(std::span<const double> total, const tensor_spec& spec, std::size_t first)
{
    visit_storage(spec.dtype, spec.name, [&]<class T>(std::type_identity<T>) {
        for (std::size_t i = 0; i < total.size(); ++i) {
            const auto value = static_cast<arithmetic_type<T>>(total[i]);
            if (std::isfinite(static_cast<double>(widen<arithmetic_type<T>>(narrow<T>(value))))) { continue; }
            raise<nonfinite_error>(error_code::result_overflow,
                message("'", spec.name, "' of all parts together is beyond ", to_string(spec.dtype), " at index ",
                    first + i, ": scale the inputs that these statistics are collected from down"));
        }
    });
}

} // namespace detail

/// Joins statistics of one model over parts of its data into one file, as if they had been collected in one go: Grams
/// add up, Fishers are means weighted by their examples. dtypes are those of the first part. Sums run in f64 in the
/// order of the parts. Throws invalid_argument for parts of different kinds, models or tensors, or without metadata,
/// for a negative Fisher, for more than 2^64-1 examples, and for what is no Gram matrix; shape_mismatch;
/// nonfinite_error, also where a total is beyond its dtype; io_error, also where a part changed meanwhile. Calls
/// `before_commit(info, tensors)` once the file is complete, before it takes its name: what that throws leaves the
/// output as it was.
template <std::invocable<const statistics_info&, std::size_t> Call>
void combine_statistics(const std::vector<std::filesystem::path>& parts, const std::filesystem::path& out,
    durability mode, Call&& before_commit)
{
    if (parts.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, "no statistics were given: at least one file is needed");
    }
    std::vector<statistics_file> files;
    for (const auto& part : parts) { files.emplace_back(part); }
    const statistics_file& first = files.front();
    statistics_info info = first.info();
    info.examples = 0;
    std::vector<double> weights;
    for (const auto& file : files) {
        const auto differ = [&](std::string_view what) {
            raise<invalid_argument>(error_code::statistics_differ,
                message("'", file.path().string(), "' and '", first.path().string(), "' ", what,
                    ": only parts of one collection can be joined"));
        };
        if (!file.described()) {
            raise<invalid_argument>(error_code::statistics_kind,
                message(
                    "'", file.path().string(), "' does not say what it holds (no schema '", statistics_schema, "')"));
        }
        if (file.info().kind != info.kind) { differ("hold different kinds of statistics"); }
        if (file.info().fingerprint != info.fingerprint) { differ("come from different models"); }
        if (file.info().in_out != info.in_out) { differ("disagree about the layout of weights"); }
        if (file.model().size() != first.model().size()) { differ("hold different tensors"); }
        for (const auto& [label, tensor] : file.model()) {
            const auto* const partner = first.model().find(label);
            if (!partner) { differ("hold different tensors"); }
            if (partner->shape != tensor.shape) {
                raise<shape_mismatch>(error_code::statistics_shape,
                    message("'", label, "' has shape ", to_string(tensor.shape), " in '", file.path().string(),
                        "' and ", to_string(partner->shape), " in '", first.path().string(), "'"));
            }
        }
        if (detail::sum_wraps(info.examples, file.info().examples, info.examples)) {
            raise<invalid_argument>(error_code::statistics_invalid,
                message("the parts come from more than 2^64-1 examples together, '", file.path().string(), "' from ",
                    file.info().examples, ": their counts cannot be right"));
        }
        weights.push_back(info.kind == statistics_kind::gram ? 1.0 : static_cast<double>(file.info().examples));
    }
    if (info.kind != statistics_kind::gram) {
        if (info.examples == 0) {
            raise<invalid_argument>(error_code::inputs_empty, "the Fishers to join come from no examples");
        }
        for (double& weight : weights) { weight /= static_cast<double>(info.examples); }
    }
    else {
        for (const auto& file : files) { detail::check_grams(file); }
    }
    std::vector<tensor_spec> specs;
    for (const auto& [label, tensor] : first.model()) { specs.push_back({label, tensor.dtype, tensor.shape}); }
    safetensors_writer writer(out, specs, detail::statistics_metadata(info), mode);
    constexpr std::size_t piece = std::size_t{1} << 18;
    for (std::size_t index = 0; index < specs.size(); ++index) {
        const std::size_t size = specs[index].size();
        for (std::size_t at = 0; at < size; at += piece) {
            const std::size_t n = std::min(piece, size - at);
            std::vector<double> total(n, 0.0);
            for (std::size_t f = 0; f < files.size(); ++f) {
                const auto values = detail::read_widened(files[f].model()[index].tensor, at, n);
                for (std::size_t i = 0; i < n; ++i) {
                    if (!std::isfinite(values[i]) || (info.kind != statistics_kind::gram && values[i] < 0)) {
                        const auto what = message("'", specs[index].name, "' of '", files[f].path().string(),
                            "' holds ", values[i], " at index ", at + i);
                        if (std::isfinite(values[i])) {
                            raise<invalid_argument>(error_code::statistics_invalid,
                                what + ": a diagonal Fisher is a mean of squares and cannot be negative");
                        }
                        raise<nonfinite_error>(error_code::statistics_not_finite, what + ": collect this part again");
                    }
                }
                kernels::accumulate(total.data(), values.data(), weights[f], n);
            }
            detail::check_total(total, specs[index], at);
            detail::write_narrowed(writer, index, at, specs[index].dtype, total);
        }
    }
    writer.finish();
    for (const auto& file : files) { file.file().map().check_unchanged(); }
    before_commit(std::as_const(info), specs.size());
    writer.commit();
}

/// The same, without a call.
inline void combine_statistics(const std::vector<std::filesystem::path>& parts, const std::filesystem::path& out,
    durability mode = durability::synchronised)
{
    combine_statistics(parts, out, mode, [](const statistics_info&, std::size_t) { });
}

} // namespace taskvec::inline TASKVEC_ABI
