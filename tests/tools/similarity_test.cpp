// taskvec similarity.
// SPDX-License-Identifier: Apache-2.0
#include "../skip.hpp"
#include "run_tool.hpp"

#include <nlohmann/json.hpp>

#include <sstream>

using namespace tools_test;

namespace {

struct similar_models {
    scratch folder;
    values_model base = sample_base();
    std::vector<values_model> tasks{sample_task(base, 30), sample_task(base, 31), base};

    similar_models()
    {
        write_values(folder / "base.safetensors", base);
        write_values(folder / "one.safetensors", tasks[0]);
        write_values(folder / "b,\"q\".safetensors", tasks[1]);
        write_values(folder / "same.safetensors", tasks[2]);
    }
    outcome compare(std::vector<std::string> more, const std::vector<std::string>& environment = {}) const
    {
        std::vector<std::string> arguments{"similarity", "--base", "base.safetensors", "--task", "one.safetensors",
            "--task", "b,\"q\".safetensors", "--task", "same.safetensors"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return run(folder, arguments, environment);
    }
    double cosine(std::size_t a, std::size_t b) const
    {
        const auto x = task_vector(base, tasks[a]), y = task_vector(base, tasks[b]);
        double xy = 0, xx = 0, yy = 0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            xy += static_cast<double>(x[i]) * y[i];
            xx += static_cast<double>(x[i]) * x[i];
            yy += static_cast<double>(y[i]) * y[i];
        }
        return xx * yy == 0 ? 0 : xy / std::sqrt(xx * yy);
    }
};

} // namespace

TEST_CASE("similarity prints a table and writes the matrix as CSV")
{
    const similar_models m;
    const auto result = m.compare({"--csv", "c.csv"});
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    CHECK(result.out.find("one") != std::string::npos);
    std::istringstream csv(slurp(m.folder / "c.csv"));
    std::string line;
    std::getline(csv, line);
    CHECK(line == "task,one,\"b,\"\"q\"\"\",same");
    for (std::size_t r = 0; r < 3; ++r) {
        std::getline(csv, line);
        const std::string label = r == 0 ? "one," : r == 1 ? "\"b,\"\"q\"\"\"," : "same,";
        REQUIRE(line.starts_with(label));
        std::istringstream numbers(line.substr(label.size()));
        for (std::size_t c = 0; c < 3; ++c) {
            std::string number;
            std::getline(numbers, number, ',');
            CHECK(std::stod(number) == doctest::Approx(r == c && r < 2 ? 1.0 : m.cosine(r, c)).epsilon(1e-9));
        }
    }
}

TEST_CASE("similarity draws the matrix where gnuplot is, and says what to install where it is not")
{
    const similar_models m;
    const auto without = m.compare({"--csv", "c.csv", "--svg", "s.svg", "--report", "r.json"}, {"PATH=/nonexistent"});
    CHECK(without.code == 1);
    const auto error = without.err.find("taskvec: error: "); // behind the note that same.safetensors is the base
    REQUIRE(error != std::string::npos);
    CHECK(is_error_line(without.err.substr(error)));
    CHECK(without.err.find("install gnuplot") != std::string::npos);
    CHECK(without.out.empty());
    for (const char* file : {"c.csv", "s.svg", "r.json"}) { CHECK_FALSE(std::filesystem::exists(m.folder / file)); }

    if (std::system("command -v gnuplot > /dev/null 2>&1") != 0) {
        testing::skip("no chart was drawn: gnuplot is not installed");
        return;
    }
    const auto with = m.compare({"--svg", "s.svg"});
    CAPTURE(with.err);
    REQUIRE(with.code == 0);
    const auto svg = slurp(m.folder / "s.svg");
    CHECK(svg.find("</svg>") != std::string::npos);
    CHECK(svg.find("b,\"q\"") != std::string::npos);
    CHECK(svg.find("1.00") != std::string::npos);
    // One title, and none in gnuplot's words.
    const auto title = svg.find("<title>Cosine of task vectors</title>");
    REQUIRE(title != std::string::npos);
    CHECK(svg.find("<title>") == title);
    CHECK(svg.rfind("<title>") == title);

    // Many tasks: the colour bar's numbers stand in the picture. A long name loses its middle, and takes no more room
    // than that.
    std::vector<std::string> many{"similarity", "--base", "base.safetensors", "--svg", "many.svg"};
    const std::string start(40, 'x'), end(40, 'y');
    for (int i = 0; i < 28; ++i) {
        const auto name = (i == 5 ? start + end : "task" + std::to_string(i)) + ".safetensors";
        write_values(m.folder / name, m.tasks[0]);
        many.insert(many.end(), {"--task", name});
    }
    REQUIRE(run(m.folder, many).code == 0);
    const auto drawn = slurp(m.folder / "many.svg");
    const auto view = drawn.find("viewBox=\"0 0 ");
    REQUIRE(view != std::string::npos);
    const double width = std::stod(drawn.substr(view + 13));
    CHECK(width < 28 * 56 + 9 * 28 + 24 + 96 + 1);
    for (const char* number : {">-0.5</text>", "> 0.5</text>"}) {
        const auto text = drawn.find(number);
        REQUIRE(text != std::string::npos);
        const double x = std::stod(drawn.substr(drawn.rfind("translate(", text) + 10));
        CHECK(x > width - 70);
        CHECK(x < width - 30);
    }
    CHECK(drawn.find(">" + start.substr(0, 14) + "…" + end.substr(0, 13) + "<") != std::string::npos);
    CHECK(drawn.find(start) == std::string::npos);
}

TEST_CASE("similarity refuses bad input")
{
    const similar_models m;
    auto other = m.base;
    other.erase("scale");
    write_values(m.folder / "lacks.safetensors", other);
    const auto result =
        run(m.folder, {"similarity", "--base", "base.safetensors", "--task", "lacks.safetensors", "--csv", "c.csv"});
    CHECK(result.code == 1);
    CHECK(is_error_line(result.err));
    CHECK_FALSE(std::filesystem::exists(m.folder / "c.csv"));
}

TEST_CASE("cosines of numbers near the ends of their types, and of tasks that are not finite")
{
    const scratch folder;
    write_values(folder / "base.safetensors", {{"w", {taskvec::dtype::f32, {2}, {-3e38F, 2}}}});
    write_values(folder / "x.safetensors", {{"w", {taskvec::dtype::f32, {2}, {3e38F, 3}}}});
    write_values(folder / "y.safetensors", {{"w", {taskvec::dtype::f32, {2}, {3e38F, 5}}}});
    write_values(folder / "nan.safetensors", {{"w", {taskvec::dtype::f32, {2}, {std::nanf(""), 5}}}});
    const std::vector<std::string> words{"similarity", "--base", "base.safetensors", "--task", "x.safetensors",
        "--task", "y.safetensors", "--csv", "c.csv", "--report", "r.json"};
    REQUIRE(run(folder, words).code == 0);
    CHECK(slurp(folder / "c.csv") == "task,x,y\nx,1,1\ny,1,1\n");
    const auto report = nlohmann::json::parse(slurp(folder / "r.json"));
    CHECK(report["bytes_written"] == slurp(folder / "c.csv").size());

    const auto with_nan = run(folder,
        {"similarity", "--base", "base.safetensors", "--task", "x.safetensors", "--task", "nan.safetensors",
            "--nonfinite", "propagate", "--csv", "n.csv"});
    REQUIRE(with_nan.code == 0);
    CHECK(slurp(folder / "n.csv") == "task,x,nan\nx,1,nan\nnan,nan,nan\n");
    CHECK(with_nan.out.find("-nan") == std::string::npos);
}
