// --resume DIR: what a run has finished stays there when it is killed, and the same command line goes on from it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"

#include <taskvec/formats/file.hpp>
#include <taskvec/linalg/svd.hpp>

#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace tool {

class command;

/// --resume, and the words that the result depends on.
struct resume_request {
    std::string directory; ///< empty: not wanted
    std::vector<std::pair<std::string, std::string>> words{};
};
/// Adds --resume. `kept`: what stays in the directory, for the help.
void add_resume_option(command& verb, resume_request& request, const std::string& kept);

/// A directory with what earlier runs of one command line finished. It holds what the result is made of (words, sizes
/// and times of input files), and is refused where that differs. Nobody else works in it meanwhile.
class resumed_work {
public:
    /// Makes the directory, or opens it. Throws io_error, invalid_argument.
    resumed_work(const resume_request& request, const std::vector<fs::path>& inputs);
    resumed_work(const resumed_work&) = delete;
    resumed_work& operator=(const resumed_work&) = delete;

    [[nodiscard]] const fs::path& path() const { return path_; }
    /// Removes it, as the result has its name.
    void remove() noexcept;

private:
    fs::path path_;
    std::optional<taskvec::directory_lock> lock_;
};

/// Decompositions of layers, kept in a directory in the order in which they are made.
class kept_layers {
public:
    explicit kept_layers(fs::path directory)
        : directory_(std::move(directory))
    { }
    /// The next layer, where it is there: rows×cols. Throws format_error where another is.
    template <class T>
    [[nodiscard]] std::optional<taskvec::svd_result<T>> next(std::size_t rows, std::size_t cols);
    /// Keeps what next() did not find.
    template <class T>
    void keep(const taskvec::svd_result<T>& layer);
    [[nodiscard]] std::size_t found() const { return found_; }

private:
    [[nodiscard]] fs::path place() const;

    fs::path directory_;
    std::size_t count_ = 0, found_ = 0;
};

} // namespace tool
