// What killed runs had finished.
// SPDX-License-Identifier: Apache-2.0
#include "resume.hpp"

#include "command.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/core/config.hpp>
#include <taskvec/formats/safetensors.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <system_error>

namespace tool {

namespace {

constexpr const char* state_file = "made-of.txt";

/// What tells a file from another one of its name.
std::string identity_of(const fs::path& path)
{
    std::error_code ignored;
    const auto one = [&](const fs::path& file) {
        return taskvec::message(fs::canonical(file, ignored).string(), ' ', std::uint64_t{fs::file_size(file, ignored)},
            ' ', static_cast<std::int64_t>(fs::last_write_time(file, ignored).time_since_epoch().count()), '\n');
    };
    if (!fs::is_directory(path, ignored)) { return one(path); }
    std::vector<std::string> lines;
    for (const auto& entry : fs::directory_iterator(path, ignored)) {
        if (entry.is_regular_file(ignored)) { lines.push_back(one(entry.path())); }
    }
    std::sort(lines.begin(), lines.end());
    std::string text;
    for (const auto& line : lines) { text += line; }
    return text;
}

/// The first line of `now` that `before` has not.
std::string first_difference(const std::string& before, const std::string& now)
{
    std::size_t begin = 0;
    for (std::size_t i = 0; i <= now.size(); ++i) {
        if (i < now.size() && i < before.size() && now[i] == before[i]) {
            if (now[i] == '\n') { begin = i + 1; }
            continue;
        }
        break;
    }
    return now.substr(begin, now.find('\n', begin) - begin);
}

} // namespace

void add_resume_option(command& verb, resume_request& request, const std::string& kept)
{
    verb.text("--resume", request.directory, "DIR",
        kept + " stay in this directory when the run is killed, and the same command line goes on from them");
    verb.after_parse([&request](const std::vector<std::pair<std::string, std::string>>& given) {
        static constexpr std::array free{"--resume", "--out", "--threads", "--memory", "--quiet", "--report",
            "--no-card"}; // the same bytes with any
        for (const auto& word : given) {
            if (std::find(free.begin(), free.end(), word.first) == free.end()) { request.words.push_back(word); }
        }
    });
}

resumed_work::resumed_work(const resume_request& request, const std::vector<fs::path>& inputs)
    : path_(request.directory)
{
    std::string now = taskvec::message(
        "taskvec ", TASKVEC_VERSION_MAJOR, '.', TASKVEC_VERSION_MINOR, '.', TASKVEC_VERSION_PATCH, '\n');
    for (const auto& [flag, value] : request.words) {
        now += printable(flag + " " + value) + "\n";
        std::error_code none;
        if (!value.empty() && fs::exists(value, none)) { now += printable(identity_of(value)) + "\n"; }
    }
    for (const auto& input : inputs) { now += printable(identity_of(input)) + "\n"; }
    check_inputs(); // what was noted is what was opened
    std::error_code failure;
    fs::create_directories(path_, failure);
    if (failure) {
        taskvec::raise<taskvec::io_error>(taskvec::system_error_code(failure.value()),
            "cannot be made, for what is finished (--resume): " + failure.message(), path_.string(), failure.value());
    }
    lock_.emplace(path_);
    const auto state = path_ / state_file;
    if (fs::exists(state, failure)) {
        const auto before = taskvec::read_text_file(state);
        if (before != now) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
                taskvec::message("--resume: ", in_quotes(path_),
                    " was begun by another command line, or its inputs have changed since: it does not have '",
                    first_difference(before, now), "'; give the same, another directory, or remove this one"));
        }
    }
    else {
        for (const auto& entry : fs::directory_iterator(path_, failure)) {
            if (entry.path() == lock_->path() || entry.path().filename().string().starts_with(".taskvec-")) {
                continue;
            }
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
                taskvec::message("--resume: ", in_quotes(path_), " holds other files, such as '",
                    printable(entry.path().filename().string()), "': name a directory of its own"));
        }
        taskvec::write_text_file(state, now);
    }
    interrupt_leaves() =
        "what is finished stays in " + in_quotes(path_) + ", and the same command line goes on from there";
    for (const auto& entry : fs::directory_iterator(path_, failure)) { // of runs that were killed
        const auto name = entry.path().filename().string();
        if (name.starts_with(".taskvec-") && name.ends_with(".tmp")) { fs::remove(entry.path(), failure); }
    }
}

void resumed_work::remove() noexcept
{
    try {
        std::error_code ignored;
        for (const auto& entry : fs::directory_iterator(path_, ignored)) {
            const auto name = entry.path().filename().string();
            const bool own = name == state_file
                || ((name.starts_with("shard-") || name.starts_with("layer-")) && name.ends_with(".safetensors"));
            if (own) { fs::remove(entry.path(), ignored); }
        }
        lock_.reset();
        fs::remove(path_, ignored); // unless somebody put something there
    }
    catch (...) { // it stays
    }
}

fs::path kept_layers::place() const
{
    return directory_ / taskvec::message("layer-", count_, ".safetensors");
}

template <class T>
std::optional<taskvec::svd_result<T>> kept_layers::next(std::size_t rows, std::size_t cols)
{
    ++count_;
    std::error_code ignored;
    if (!fs::exists(place(), ignored)) { return std::nullopt; }
    const taskvec::safetensors_file file(place());
    const auto model = file.model();
    const auto find = [&](const char* name, taskvec::dtype type) -> const taskvec::const_tensor_ref& {
        const auto* const tensor = model.find(name);
        if (!tensor || tensor->dtype != type) {
            taskvec::raise<taskvec::format_error>(
                taskvec::error_code::file_tensors, "holds no decomposition of a layer", file.path().string());
        }
        return *tensor;
    };
    const auto &u = find("u", taskvec::dtype_of<T>), &v = find("v", taskvec::dtype_of<T>);
    const auto &sigma = find("sigma", taskvec::dtype::f64), &squares = find("squares", taskvec::dtype::f64);
    const auto rank = static_cast<std::int64_t>(sigma.size());
    if (u.shape != taskvec::extents{rank, static_cast<std::int64_t>(rows)}
        || v.shape != taskvec::extents{rank, static_cast<std::int64_t>(cols)} || squares.size() != 2) {
        taskvec::raise<taskvec::format_error>(
            taskvec::error_code::file_tensors, "is the decomposition of another layer", file.path().string());
    }
    ++found_;
    taskvec::svd_result<T> layer;
    const auto q = static_cast<std::size_t>(rank);
    layer.u = taskvec::matrix<T>(rows, q);
    layer.v = taskvec::matrix<T>(cols, q);
    layer.sigma.resize(q);
    double both[2];
    std::memcpy(layer.u.data(), u.data, u.bytes());
    std::memcpy(layer.v.data(), v.data, v.bytes());
    std::memcpy(layer.sigma.data(), sigma.data, sigma.bytes());
    std::memcpy(both, squares.data, sizeof both);
    layer.squared_norm = both[0];
    layer.squared_error = both[1];
    return layer;
}

template <class T>
void kept_layers::keep(const taskvec::svd_result<T>& layer)
{
    const auto columns = [](const taskvec::matrix<T>& from) {
        taskvec::matrix<T> result(from.rows(), from.cols()); // column by column, whatever `from` is
        for (std::size_t j = 0; j < from.cols(); ++j) {
            for (std::size_t i = 0; i < from.rows(); ++i) { result(i, j) = from(i, j); }
        }
        return result;
    };
    const auto u = columns(layer.u), v = columns(layer.v);
    const double both[2] = {layer.squared_norm, layer.squared_error};
    const auto rank = static_cast<std::int64_t>(layer.rank());
    const taskvec::const_model_ref model{{"sigma", {layer.sigma.data(), taskvec::dtype::f64, {rank}}},
        {"squares", {both, taskvec::dtype::f64, {2}}},
        {"u", {u.data(), taskvec::dtype_of<T>, {rank, static_cast<std::int64_t>(u.rows())}}},
        {"v", {v.data(), taskvec::dtype_of<T>, {rank, static_cast<std::int64_t>(v.rows())}}}};
    taskvec::write_safetensors(place(), model);
}

template std::optional<taskvec::svd_result<float>> kept_layers::next<float>(std::size_t, std::size_t);
template std::optional<taskvec::svd_result<double>> kept_layers::next<double>(std::size_t, std::size_t);
template void kept_layers::keep<float>(const taskvec::svd_result<float>&);
template void kept_layers::keep<double>(const taskvec::svd_result<double>&);

} // namespace tool
