// SPDX-License-Identifier: Apache-2.0
#include "data.hpp"

#include <taskvec/core/error.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

using namespace digits;

namespace {

dataset images()
{
    static const dataset all = load_images(DIGITS_DATA_FILE);
    return all;
}

/// The rows of one image, normalised as tasks are.
matrix normalised(const matrix& pixels)
{
    return (pixels.array() - 0.3f) / 0.37f;
}

/// Applies a task's rearrangement again: in_domain works on pixels of 0 … 1, so undo the normalisation first.
dataset again(const dataset& shown, std::size_t task)
{
    return in_domain({matrix(shown.inputs.array() * 0.37f + 0.3f), shown.labels}, task);
}

double difference(const matrix& a, const matrix& b)
{
    return (a - b).cwiseAbs().maxCoeff();
}

struct temporary_file {
    explicit temporary_file(const std::string& text)
        : path(std::filesystem::temp_directory_path() / "taskvec-digits-data-test.csv")
    {
        std::ofstream(path) << text;
    }
    ~temporary_file() { std::filesystem::remove(path); }
    std::filesystem::path path;
};

} // namespace

TEST_CASE("the data file holds 1,797 images of 64 pixels, about as many of each digit")
{
    const dataset all = images();
    CHECK(all.size() == 1797);
    CHECK(all.inputs.rows() == 1797);
    CHECK(all.inputs.cols() == 64);
    CHECK(all.inputs.minCoeff() == 0.0f);
    CHECK(all.inputs.maxCoeff() == 1.0f);
    const std::vector<std::ptrdiff_t> counts{178, 182, 177, 183, 181, 182, 181, 179, 174, 180};
    for (int digit = 0; digit < 10; ++digit) {
        CHECK(std::count(all.labels.begin(), all.labels.end(), digit) == counts[static_cast<std::size_t>(digit)]);
    }
    // The first line of the file: 0,0,5,13,9,1,0,0, … 0
    CHECK(all.inputs(0, 2) == 5.0f / 16.0f);
    CHECK(all.inputs(0, 3) == 13.0f / 16.0f);
    CHECK(all.labels[0] == 0);
}

TEST_CASE("a split deals every image to exactly one part, and differs between seeds")
{
    // Images are told apart by a pixel that holds their index.
    dataset marked = images();
    for (Eigen::Index i = 0; i < marked.inputs.rows(); ++i) { marked.inputs(i, 0) = static_cast<float>(i); }
    const splits a = split(marked, 1), b = split(marked, 1), c = split(marked, 2);
    CHECK(a.train.size() == 1000);
    CHECK(a.validation.size() == 300);
    CHECK(a.test.size() == 497);
    std::set<float> seen;
    for (const auto* part : {&a.train, &a.validation, &a.test}) {
        for (Eigen::Index i = 0; i < part->inputs.rows(); ++i) {
            const float index = part->inputs(i, 0);
            CHECK(seen.insert(index).second);
            CHECK(part->labels[static_cast<std::size_t>(i)] == marked.labels[static_cast<std::size_t>(index)]);
        }
    }
    CHECK(seen.size() == 1797);
    CHECK(a.train.inputs == b.train.inputs);
    CHECK(a.train.inputs != c.train.inputs);
}

TEST_CASE("the eight domains are what their names say")
{
    const dataset all = images();
    const matrix plain = normalised(all.inputs);
    std::vector<dataset> shown = in_every_domain(all);
    REQUIRE(shown.size() == 8);
    for (const auto& task : shown) {
        CHECK(task.labels == all.labels);
        CHECK(difference(task.inputs, plain) > 0.5);
    }
    // Counter-clockwise: the top right corner comes to the top left.
    CHECK(shown[0].inputs(0, 0) == doctest::Approx(plain(0, 7)));
    CHECK(shown[0].inputs(0, 8) == doctest::Approx(plain(0, 6)));
    CHECK(difference(again(shown[0], 0).inputs, shown[1].inputs) < 1e-5); // 90° twice is 180°
    CHECK(difference(again(shown[1], 0).inputs, shown[2].inputs) < 1e-5); // once more is 270°
    CHECK(difference(again(shown[2], 0).inputs, plain) < 1e-5);
    for (const std::size_t own_inverse : {1u, 3u, 4u, 5u, 6u}) {
        CHECK(difference(again(shown[own_inverse], own_inverse).inputs, plain) < 1e-5);
    }
    CHECK(difference(again(shown[4], 5).inputs, shown[1].inputs) < 1e-5); // both flips are 180°
    CHECK(difference(again(shown[3], 5).inputs, shown[0].inputs) < 1e-5); // transposed, then upside down, is 90°
    // A permutation: the same pixels in another order, the same order for every image.
    for (const Eigen::Index image : {0, 1, 1796}) {
        std::vector<float> a(64), b(64);
        for (int p = 0; p < 64; ++p) {
            a[static_cast<std::size_t>(p)] = plain(image, p);
            b[static_cast<std::size_t>(p)] = shown[7].inputs(image, p);
        }
        std::sort(a.begin(), a.end());
        std::sort(b.begin(), b.end());
        for (std::size_t p = 0; p < 64; ++p) { CHECK(a[p] == doctest::Approx(b[p])); }
    }
}

TEST_CASE("shuffled() is a permutation, uniform enough, and a function of its key")
{
    auto order = shuffled(1000, 3, 4, "name");
    CHECK(order == shuffled(1000, 3, 4, "name"));
    CHECK(order != shuffled(1000, 3, 5, "name"));
    CHECK(order != shuffled(1000, 3, 4, "other name"));
    std::size_t fixed = 0;
    for (std::size_t i = 0; i < order.size(); ++i) { fixed += order[i] == i; }
    CHECK(fixed < 8); // one is expected
    std::sort(order.begin(), order.end());
    for (std::size_t i = 0; i < order.size(); ++i) { CHECK(order[i] == i); }
}

TEST_CASE("files that are not the digits are refused by name")
{
    CHECK_THROWS_AS(load_images("/nonexistent/digits.csv"), taskvec::io_error);
    std::ifstream stream(DIGITS_DATA_FILE);
    const std::string good{std::istreambuf_iterator<char>(stream), {}};
    const auto refused = [](const std::string& text) {
        const temporary_file file(text);
        try {
            load_images(file.path);
        }
        catch (const taskvec::format_error& e) {
            CHECK(std::string(e.what()).find(file.path.string()) != std::string::npos);
            return true;
        }
        return false;
    };
    CHECK_FALSE(refused(good));
    CHECK(refused("x" + good.substr(1)));
    CHECK(refused("17" + good.substr(1)));
    CHECK(refused("-1" + good.substr(1)));
    CHECK(refused(good.substr(0, good.size() / 2))); // cut short, inside a line
    CHECK(refused(good.substr(0, good.find('\n') + 1))); // one image
    std::string wide = good;
    wide.insert(wide.find('\n'), ",1");
    CHECK(refused(wide));
}
