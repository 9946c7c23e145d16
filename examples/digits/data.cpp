// SPDX-License-Identifier: Apache-2.0
#include "data.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/core/random.hpp>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>
#include <utility>

namespace digits {

dataset load_images(const std::filesystem::path& file)
{
    std::ifstream stream(file, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(stream), {}};
    if (!stream.is_open() || stream.bad() || text.empty()) {
        taskvec::raise<taskvec::io_error>(
            taskvec::error_code::file_access, "cannot be read; say with --data where the digits are", file.string());
    }

    std::vector<int> numbers;
    const char *at = text.data(), *const end = at + text.size();
    while (at != end) {
        int value = 0;
        const auto [next, error] = std::from_chars(at, end, value);
        const int limit = numbers.size() % (pixels + 1) == pixels ? classes - 1 : 16;
        const char expected = numbers.size() % (pixels + 1) == pixels ? '\n' : ',';
        if (error != std::errc{} || value < 0 || value > limit || (next != end && *next != expected)) {
            taskvec::raise<taskvec::format_error>(taskvec::error_code::csv_syntax,
                "line " + std::to_string(numbers.size() / (pixels + 1) + 1)
                    + ": expected 64 pixels of 0 to 16 and a label of 0 to 9, separated by commas",
                file.string(), static_cast<std::uint64_t>(at - text.data()));
        }
        numbers.push_back(value);
        at = next == end ? end : next + 1;
    }
    const std::size_t count = numbers.size() / (pixels + 1);
    if (numbers.size() % (pixels + 1) != 0 || count <= train_size + validation_size) {
        taskvec::raise<taskvec::format_error>(taskvec::error_code::csv_syntax,
            "found " + std::to_string(count) + " complete images; expected more than "
                + std::to_string(train_size + validation_size) + " and no incomplete line",
            file.string(), text.size());
    }

    dataset images{matrix(count, pixels), std::vector<int>(count)};
    for (std::size_t i = 0; i < count; ++i) {
        for (int p = 0; p < pixels; ++p) {
            images.inputs(static_cast<Eigen::Index>(i), p) = static_cast<float>(numbers[i * (pixels + 1) + p]) / 16.0f;
        }
        images.labels[i] = numbers[i * (pixels + 1) + pixels];
    }
    return images;
}

dataset subset(const dataset& all, const std::vector<std::size_t>& indices)
{
    dataset chosen{all.inputs(indices, Eigen::all), {}};
    for (const auto index : indices) { chosen.labels.push_back(all.labels[index]); }
    return chosen;
}

dataset first(const dataset& all, std::size_t count)
{
    return {all.inputs.topRows(static_cast<Eigen::Index>(count)),
        {all.labels.begin(), all.labels.begin() + static_cast<std::ptrdiff_t>(count)}};
}

std::vector<std::size_t> shuffled(std::size_t count, std::uint64_t seed, std::uint32_t stream, std::string_view name)
{
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), std::size_t{0});
    const taskvec::random_stream random(seed, stream, name);
    for (std::size_t left = count; left > 1; --left) {
        const std::uint64_t choice = (std::uint64_t{random.word(left)} * left) >> 32;
        std::swap(order[left - 1], order[choice]);
    }
    return order;
}

splits split(const dataset& all, std::uint64_t seed)
{
    const auto order = shuffled(all.size(), seed, 0, "split");
    const auto part = [&](std::size_t first, std::size_t last) {
        return subset(all,
            {order.begin() + static_cast<std::ptrdiff_t>(first), order.begin() + static_cast<std::ptrdiff_t>(last)});
    };
    return {part(0, train_size), part(train_size, train_size + validation_size),
        part(train_size + validation_size, all.size())};
}

dataset in_domain(const dataset& images, std::size_t task)
{
    constexpr int last = image_side - 1;
    const auto permutation = shuffled(pixels, 0, 0, "pixel permutation");
    dataset shown{matrix(images.inputs.rows(), pixels), images.labels};
    for (int row = 0; row < image_side; ++row) {
        for (int column = 0; column < image_side; ++column) {
            const auto pixel = [](int r, int c) { return r * image_side + c; };
            int source = pixel(row, column);
            bool inverted = false;
            switch (task) {
            case 0: source = pixel(column, last - row); break;
            case 1: source = pixel(last - row, last - column); break;
            case 2: source = pixel(last - column, row); break;
            case 3: source = pixel(column, row); break;
            case 4: source = pixel(row, last - column); break;
            case 5: source = pixel(last - row, column); break;
            case 6: inverted = true; break;
            case 7: source = static_cast<int>(permutation[static_cast<std::size_t>(source)]); break;
            default:
                taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::index_out_of_range,
                    "the digits example has tasks 0 to 7, not " + std::to_string(task));
            }
            for (Eigen::Index i = 0; i < images.inputs.rows(); ++i) {
                const float value = images.inputs(i, source);
                shown.inputs(i, pixel(row, column)) = ((inverted ? 1.0f - value : value) - 0.3f) / 0.37f;
            }
        }
    }
    return shown;
}

std::vector<dataset> in_every_domain(const dataset& images)
{
    std::vector<dataset> all;
    for (std::size_t task = 0; task < tasks; ++task) { all.push_back(in_domain(images, task)); }
    return all;
}

} // namespace digits
