// taskvec sweep and lorahub, with small shell commands as scores.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include "../capture.hpp"
#include "../skip.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <sstream>
#include <thread>

using namespace tools_test;

namespace {

const std::string digest = "cksum < {} | cut -d ' ' -f 1"; // a number that any other byte changes

struct sweep_models {
    scratch folder;

    sweep_models()
    {
        const auto base = sample_base();
        write_values(folder / "base.safetensors", base);
        for (unsigned t = 0; t < 3; ++t) {
            write_values(
                folder / (std::string(1, static_cast<char>('a' + t)) + ".safetensors"), sample_task(base, 40 + t));
        }
        std::filesystem::create_directory(folder / "tmp");
    }
    std::vector<std::string> command(
        const std::string& score, const std::vector<std::string>& more, const std::string& tasks = "abc") const
    {
        std::vector<std::string> arguments{"sweep", "--base", "base.safetensors", "--score", score};
        for (const char task : tasks) {
            arguments.push_back("--task");
            arguments.push_back(std::string(1, task) + ".safetensors");
        }
        arguments.insert(arguments.end(), more.begin(), more.end());
        return arguments;
    }
    outcome sweep(
        const std::string& score, const std::vector<std::string>& more, const std::string& tasks = "abc") const
    {
        const auto result = run(folder, command(score, more, tasks), {"TMPDIR=" + (folder / "tmp").string()});
        CHECK(std::filesystem::is_empty(folder / "tmp")); // candidates go, whatever happens
        return result;
    }
    std::vector<std::string> table(const std::string& file = "s.csv") const
    {
        std::vector<std::string> lines;
        std::istringstream text(slurp(folder / file));
        for (std::string line; std::getline(text, line);) { lines.push_back(line); }
        return lines;
    }
    /// What `digest` says of a merge made by the verb merge.
    std::string score_of(const std::vector<std::string>& more, const std::string& tasks = "abc") const
    {
        std::vector<std::string> arguments{"merge", "--base", "base.safetensors", "--out", "expected.safetensors"};
        for (const char task : tasks) {
            arguments.push_back("--task");
            arguments.push_back(std::string(1, task) + ".safetensors");
        }
        arguments.insert(arguments.end(), more.begin(), more.end());
        REQUIRE(run(folder, arguments).code == 0);
        const auto shell = "cksum < '" + (folder / "expected.safetensors").string() + "' | cut -d ' ' -f 1 > '"
            + (folder / "digest").string() + "'";
        REQUIRE(std::system(shell.c_str()) == 0);
        auto text = slurp(folder / "digest");
        std::filesystem::remove(folder / "expected.safetensors");
        std::filesystem::remove(folder / "digest");
        return text.substr(0, text.find('\n'));
    }
};

/// Whether a process is there and no zombie.
bool runs(pid_t process)
{
    const auto path = "/proc/" + std::to_string(process) + "/stat";
    std::error_code ignored;
    return ::kill(process, 0) == 0 && std::filesystem::exists(path, ignored)
        && slurp(path).find(") Z ") == std::string::npos;
}

} // namespace

TEST_CASE("a lambda sweep scores what merge writes, prints the best and writes it")
{
    const sweep_models m;
    const auto done = m.sweep(
        digest, {"--lambdas", "0:0.3:0.1,1", "--csv", "s.csv", "--out", "best.safetensors", "--report", "r.json"});
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    const auto table = m.table();
    REQUIRE(table.size() == 6);
    CHECK(table[0] == "lambda,score");
    double best = -1;
    std::string where;
    for (std::size_t i = 0; i < 5; ++i) {
        const std::string lambda = std::vector<std::string>{"0", "0.1", "0.2", "0.3", "1"}[i];
        const auto score = m.score_of({"--method", "task-arithmetic", "--lambda", lambda});
        CHECK(std::stod(table[i + 1].substr(table[i + 1].find(',') + 1)) == std::stod(score));
        CHECK(table[i + 1].starts_with(lambda + ","));
        if (std::stod(score) > best) {
            best = std::stod(score);
            where = lambda;
        }
    }
    CHECK(done.out.find("lambda=" + where + " ") != std::string::npos);
    CHECK(done.out.find("best of 5 points") != std::string::npos);
    const auto report = nlohmann::json::parse(slurp(m.folder / "r.json"));
    CHECK(report["scored"] == 5);
    CHECK(report["best"]["lambda"] == where);
    CHECK(report["best"]["score"] == best);
    const auto written = slurp(m.folder / "best.safetensors");
    REQUIRE(
        run(m.folder,
            {"merge", "--method", "task-arithmetic", "--lambda", where, "--base", "base.safetensors", "--task",
                "a.safetensors", "--task", "b.safetensors", "--task", "c.safetensors", "--out", "again.safetensors"})
            .code
        == 0);
    CHECK(slurp(m.folder / "again.safetensors") == written);

    // Several commands at once: the same table. The lowest, where that is the best.
    REQUIRE(m.sweep(digest, {"--lambdas", "0:0.3:0.1,1", "--csv", "three.csv", "--jobs", "3"}).code == 0);
    CHECK(m.table("three.csv") == table);
    const auto low = m.sweep("echo 3", {"--lambdas", "0.5"});
    CHECK(low.code == 2); // nowhere to put the path
    CHECK(m.sweep("test -s {} && echo $RANDOM_ -2", {"--lambdas", "0.5", "--minimize"}).out.find("score=-2")
        != std::string::npos);
    // The default grid: 0, 0.05 … 1.
    REQUIRE(m.sweep("true {}; echo 1", {"--csv", "all.csv"}, "a").code == 0);
    CHECK(m.table("all.csv").size() == 22);
    CHECK(m.table("all.csv")[4] == "0.15,1");
}

TEST_CASE("density × lambda, and subsets")
{
    const sweep_models m;
    REQUIRE(m.sweep(digest, {"--method", "ties", "--densities", "0.1,0.5", "--lambdas", "0.3,1", "--csv", "s.csv"}).code
        == 0);
    auto table = m.table();
    REQUIRE(table.size() == 5);
    CHECK(table[0] == "density,lambda,score");
    CHECK(table[3].starts_with("0.5,0.3,"));
    CHECK(std::stod(table[3].substr(8))
        == std::stod(m.score_of({"--method", "ties", "--density", "0.5", "--lambda", "0.3"})));

    REQUIRE(m.sweep(digest, {"--subsets", "--csv", "subsets.csv", "--svg", "subsets.svg"}).code == 0);
    table = m.table("subsets.csv");
    REQUIRE(table.size() == 5);
    CHECK(table[0] == "tasks,lambda,score");
    const std::vector<std::string> names{"a+b", "a+b+c", "a+c", "b+c"}, tasks{"ab", "abc", "ac", "bc"};
    for (std::size_t i = 0; i < 4; ++i) {
        CHECK(table[i + 1].starts_with(names[i] + ",0.3,"));
        CHECK(std::stod(table[i + 1].substr(names[i].size() + 5))
            == std::stod(m.score_of({"--method", "task-arithmetic", "--lambda", "0.3"}, tasks[i])));
    }
    CHECK(slurp(m.folder / "subsets.svg").find("</svg>") != std::string::npos);
    // A method has its colour, wherever it is drawn, and a curve of something else another.
    REQUIRE(m.sweep(digest, {"--lambdas", "0.1,0.3", "--svg", "first.svg"}).code == 0);
    REQUIRE(
        m.sweep(digest, {"--method", "ties", "--densities", "0.5", "--lambdas", "0.1,0.3", "--svg", "second.svg"}).code
        == 0);
    const std::string of_task_arithmetic = "rgb(  0, 114, 178)", of_half = "rgb(140, 140, 140)";
    CHECK(slurp(m.folder / "first.svg").find(of_task_arithmetic) != std::string::npos);
    CHECK(slurp(m.folder / "first.svg").find(of_half) == std::string::npos);
    CHECK(slurp(m.folder / "second.svg").find(of_half) != std::string::npos);
    CHECK(slurp(m.folder / "second.svg").find(of_task_arithmetic) == std::string::npos);
    REQUIRE(m.sweep(digest, {"--method", "average", "--subsets", "--smallest", "3", "--csv", "average.csv"}).code == 0);
    CHECK(m.table("average.csv").size() == 2);
    CHECK(m.table("average.csv")[1].starts_with("a+b+c,"));
}

TEST_CASE("a lambda of each task's own: all combinations, with the bits of weights")
{
    const sweep_models m;
    const auto done = m.sweep(
        digest, {"--lambda-per-task", "0,0.5", "--csv", "s.csv", "--svg", "s.svg", "--out", "best.safetensors"}, "ab");
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    const auto table = m.table();
    REQUIRE(table.size() == 5);
    CHECK(table[0] == "lambda of a,lambda of b,score");
    for (const std::string point : {"0,0", "0,0.5", "0.5,0", "0.5,0.5"}) {
        const auto row = std::find_if(table.begin(), table.end(),
            [&](const std::string& line) { return line.starts_with(point + ",") && line != table[0]; });
        REQUIRE(row != table.end());
        const auto comma = point.find(',');
        REQUIRE(run(m.folder,
                    {"merge", "--method", "task-arithmetic", "--lambda", "1", "--base", "base.safetensors", "--task",
                        "a.safetensors=" + point.substr(0, comma), "--task", "b.safetensors=" + point.substr(comma + 1),
                        "--out", "one.safetensors"})
                    .code
            == 0);
        const auto shell =
            "cd '" + m.folder.path().string() + "' && cksum < one.safetensors | cut -d ' ' -f 1 > digest";
        REQUIRE(std::system(shell.c_str()) == 0);
        CHECK(std::stod(slurp(m.folder / "digest")) == std::stod(row->substr(point.size() + 1)));
        if (done.out.find("lambda of a=" + point.substr(0, comma) + " lambda of b=" + point.substr(comma + 1) + " ")
            != std::string::npos) {
            CHECK(slurp(m.folder / "best.safetensors") == slurp(m.folder / "one.safetensors"));
        }
    }
    CHECK(slurp(m.folder / "s.svg").find("</svg>") != std::string::npos);
    // Beside another option, and what the command hears.
    const auto told = m.sweep(": {}; echo $TASKVEC_DENSITY/$TASKVEC_LAMBDA >> told; wc -l < told",
        {"--method", "ties", "--densities", "0.5", "--lambda-per-task", "0.5,1"}, "ab");
    CAPTURE(told.err);
    REQUIRE(told.code == 0);
    CHECK(slurp(m.folder / "told") == "0.5/0.5,0.5\n0.5/0.5,1\n0.5/1,0.5\n0.5/1,1\n");
}

namespace {

/// Scores that are known beforehand: highest, with 0, at weights of 0.5 and -0.25. Each call adds a line to `calls`.
const std::string bowl = "echo x >> calls; echo $TASKVEC_WEIGHTS | "
                         "awk -F, '{ print \"score\", -(($1 - 0.5) ^ 2 + ($2 + 0.25) ^ 2) }'; test -s {}";

struct lorahub_models : sweep_models {
    std::vector<std::string> arguments(const std::string& score, const std::vector<std::string>& more) const
    {
        auto result = command(score, more, "ab");
        result[0] = "lorahub";
        result.insert(result.end(), {"--out", "best.safetensors"});
        return result;
    }
    outcome seek(const std::string& score, const std::vector<std::string>& more) const
    {
        const auto result = run(folder, arguments(score, more), {"TMPDIR=" + (folder / "tmp").string()});
        CHECK(std::filesystem::is_empty(folder / "tmp"));
        return result;
    }
    /// Whether the tool has an optimiser; where it has none, the verb names the package.
    bool seeks() const
    {
        const auto done = seek("echo 1 {}", {"--evaluations", "1"});
        std::filesystem::remove(folder / "best.safetensors");
        if (done.code == 0) { return true; }
        CAPTURE(done.err);
        CHECK(is_error_line(done.err));
        REQUIRE(done.err.find("libnlopt-dev") != std::string::npos);
        testing::skip("the taskvec tool was built without NLopt");
        return false;
    }
    std::size_t calls() const
    {
        const auto text = slurp(folder / "calls");
        return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
    }
};

} // namespace

TEST_CASE("lorahub finds weights, writes what merge writes with them, and goes on from its table")
{
    const lorahub_models m;
    if (!m.seeks()) { return; }
    const auto done = m.seek(bowl, {"--l1", "0", "--csv", "w.csv", "--report", "r.json"});
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    const auto table = m.table("w.csv");
    const auto count = table.size() - 1; // it may be sure of itself before
    REQUIRE(count <= 40);
    REQUIRE(count > 20);
    CHECK(done.out.find("best of " + std::to_string(count) + " candidates: a=0.") != std::string::npos);
    CHECK(table[0] == "a,b,score");
    CHECK(table[1] == "0,0,-0.3125"); // it starts at the base
    CHECK(m.calls() == count);
    const auto report = nlohmann::json::parse(slurp(m.folder / "r.json"));
    CHECK(report["evaluations"] == count);
    CHECK(report["scored"] == count);
    CHECK(std::abs(report["weights"]["a"].get<double>() - 0.5) < 0.02);
    CHECK(std::abs(report["weights"]["b"].get<double>() + 0.25) < 0.02);
    CHECK(report["score"].get<double>() > -1e-3);
    const auto written = slurp(m.folder / "best.safetensors");
    REQUIRE(run(m.folder,
                {"merge", "--method", "task-arithmetic", "--lambda", "1", "--base", "base.safetensors", "--task",
                    "a.safetensors=" + report["weights"]["a"].dump(), "--task",
                    "b.safetensors=" + report["weights"]["b"].dump(), "--out", "again.safetensors"})
                .code
        == 0);
    CHECK(slurp(m.folder / "again.safetensors") == written);

    // Again from the table: nothing is asked. From a part of it: the rest, and the same table.
    REQUIRE(m.seek(bowl, {"--l1", "0", "--csv", "w.csv"}).code == 0);
    CHECK(m.calls() == count);
    std::string part;
    for (std::size_t i = 0; i < 16; ++i) { part += table[i] + "\n"; }
    spill(m.folder / "w.csv", part);
    const auto resumed = m.seek(bowl, {"--l1", "0", "--csv", "w.csv"});
    CHECK(resumed.err.find("15 scores") != std::string::npos);
    CHECK(m.table("w.csv") == table);
    CHECK(m.calls() == 2 * count - 15);
    CHECK(slurp(m.folder / "best.safetensors") == written);

    // The other way round, within other bounds, and what the L1 term does.
    const auto narrow = m.seek("echo $TASKVEC_WEIGHTS | awk -F, '{ print ($1 - 0.5) ^ 2 + ($2 + 0.25) ^ 2 }'; test "
                               "$TASKVEC_TASKS = a+b -a -s {}",
        {"--minimize", "--l1", "0", "--bounds", "0.1:0.3", "--csv", "narrow.csv", "--report", "narrow.json"});
    CAPTURE(narrow.err);
    REQUIRE(narrow.code == 0);
    CHECK(m.table("narrow.csv")[1].starts_with("0.1,0.1,")); // nearest to 0
    const auto inside = nlohmann::json::parse(slurp(m.folder / "narrow.json"))["weights"];
    CHECK(std::abs(inside["a"].get<double>() - 0.3) < 1e-3);
    CHECK(std::abs(inside["b"].get<double>() - 0.1) < 1e-3);
    REQUIRE(m.seek(bowl, {"--l1", "10", "--evaluations", "20", "--report", "l1.json"}).code == 0);
    const auto none = nlohmann::json::parse(slurp(m.folder / "l1.json"));
    CHECK(none["weights"]["a"] == 0);
    CHECK(none["weights"]["b"] == 0);
    CHECK(none["objective"] == 0.3125);
}

TEST_CASE("bad input of lorahub: one line that names what is wrong, and no model")
{
    const lorahub_models m;
    if (!m.seeks()) { return; }
    spill(m.folder / "other.csv", "lambda,score\n0.1,1\n");
    const auto names = m.folder.names();
    struct bad {
        std::string score;
        std::vector<std::string> arguments, parts;
        int code = 1;
    };
    const std::vector<bad> cases{{digest, {"--bounds", "1.5:-1.5"}, {"--bounds", "1.5:-1.5", "reversed"}, 2},
        {digest, {"--bounds", "1"}, {"--bounds", "'1'"}, 2}, {digest, {"--bounds", "0:nan"}, {"--bounds"}, 2},
        {digest, {"--bounds", "0:0"}, {"--bounds"}, 2}, {digest, {"--evaluations", "0"}, {"evaluations", "0"}, 2},
        {digest, {"--l1", "-1"}, {"l1", "-1"}, 2}, {digest, {"--l1", "nan"}, {"l1", "nan"}, 2},
        {"echo 1", {}, {"{}"}, 2},
        {digest, {"--task", "c.safetensors=0.5"}, {"weight 0.5", "c.safetensors", "seeks"}, 2},
        {digest, {"--timeout", "-1"}, {"--timeout"}, 2}, {"echo nan {}", {}, {"nan", "a=0 b=0", "finite"}},
        {"true {}", {}, {"no number", "a=0 b=0"}}, {"false {}", {"--csv", "none.csv"}, {"code 1", "a=0 b=0"}},
        {"echo x >> n; test $(wc -l < n) -lt 3 || exit 7; echo 1 {}; rm -f n.", {"--csv", "part.csv"}, {"code 7"}},
        {digest, {"--csv", "other.csv"}, {"other.csv", "lambda"}},
        {digest, {"--csv", "no/folder/s.csv"}, {"no/folder"}},
        {digest, {"--task", "absent.safetensors"}, {"absent.safetensors"}}};
    for (const auto& [score, arguments, parts, code] : cases) {
        const auto result = m.seek(score, arguments);
        CAPTURE_BOUND(score);
        CAPTURE(result.err);
        CHECK(result.code == code);
        CHECK(is_error_line(result.err));
        for (const auto& part : parts) { CHECK(result.err.find(part) != std::string::npos); }
        std::filesystem::remove(m.folder / "n");
        if (arguments == std::vector<std::string>{"--csv", "part.csv"}) {
            CHECK(m.table("part.csv").size() == 3); // what was scored before stays
            std::filesystem::remove(m.folder / "part.csv");
        }
        CHECK(m.folder.names() == names);
    }
    const auto dry = m.seek("touch called; echo 1 {}", {"--csv", "dry.csv", "--dry-run"});
    CHECK(dry.code == 0);
    CHECK(dry.out.find("40 candidates") != std::string::npos);
    CHECK(m.folder.names() == names);
}

TEST_CASE("the score is the last number that is printed, and no part of a word")
{
    const sweep_models m;
    const std::vector<std::pair<std::string, std::string>> cases{{"epoch 12\\nacc: 0.75 (top-1, v2, 3s)\\n", "0.75"},
        {"loss=-1.5e-2.\\n", "-0.015"}, {"50%%", "50"}, {"1\\n2\\n3", "3"}, {".5", "0.5"}, {"+2.5", "2.5"},
        {"[0.25, 0.5]", "0.5"}};
    for (const auto& [text, score] : cases) {
        CAPTURE_BOUND(text);
        const auto done = m.sweep("printf '" + text + "'; : {}", {"--lambdas", "1"}, "a");
        CAPTURE(done.err);
        CHECK(done.code == 0);
        CHECK(done.out.find("score=" + score + "\n") != std::string::npos);
    }
}

TEST_CASE("paths reach the command whole, whatever is in them")
{
    const sweep_models m;
    const std::string odd = "it's $HOME \"`x`\" \\ ;";
    std::filesystem::create_directory(m.folder / odd);
    const auto done = m.sweep(
        "test -s {} && echo $(printf %s {} | grep -c 'it.s [$]HOME')", {"--lambdas", "1", "--scratch", odd}, "a");
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    CHECK(done.out.find("score=1\n") != std::string::npos);
    CHECK(std::filesystem::is_empty(m.folder / odd));
    // Inside quotes of either kind, and inside commands inside quotes; of a plain path and of this one.
    for (const std::string& folder : {odd, std::string("tmp")}) {
        for (const char* score :
            {"test -s \"{}\" && echo 4", "test -s '{}' && echo 4", "echo \"$(test -s {} && echo 4)\"",
                "echo \"$(test -s \"{}\" && echo 4)\"", "echo `test -s \"{}\" && echo 4`",
                "n=\"it's \\\"\"; test -s {} && test -s \"{}\" && echo 4", "(test -s '{}') && echo 4"}) {
            CAPTURE(score);
            const auto result = m.sweep(score, {"--lambdas", "1", "--scratch", folder}, "a");
            CAPTURE(result.err);
            CHECK(result.code == 0);
            CHECK(result.out.find("score=4\n") != std::string::npos);
        }
    }
}

TEST_CASE("the command is told its point by variables")
{
    const sweep_models m;
    const std::string told = ": {}; echo \"$TASKVEC_TASKS/$TASKVEC_DENSITY/$TASKVEC_LAMBDA\" >> told; wc -l < told";
    const auto done = run(m.folder,
        m.command(told,
            {"--method", "ties", "--subsets", "--smallest", "3", "--densities", "0.1,0.5", "--lambdas", "1,0.25"}),
        {"TMPDIR=" + (m.folder / "tmp").string(), "TASKVEC_LAMBDA=7"});
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    CHECK(slurp(m.folder / "told") == "a+b+c/0.1/1\na+b+c/0.1/0.25\na+b+c/0.5/1\na+b+c/0.5/0.25\n");
}

TEST_CASE("a command that fails leaves the table as it was, and the next run goes on from there")
{
    const sweep_models m;
    const std::string counting = "echo x >> calls; test $(wc -l < calls) -ne 3 || exit 5; : {}; wc -l < calls";
    const std::vector<std::string> options{
        "--lambdas", "0.1,0.2,0.3,0.4", "--csv", "s.csv", "--out", "best.safetensors"};
    const auto failed = m.sweep(counting, options, "a");
    CAPTURE(failed.err);
    CHECK(failed.code == 1);
    CHECK(is_error_line(failed.err));
    for (const char* part : {"lambda=0.3", "code 5", "exit 5"}) { CHECK(failed.err.find(part) != std::string::npos); }
    CHECK(m.table() == std::vector<std::string>{"lambda,score", "0.1,1", "0.2,2"});
    CHECK_FALSE(std::filesystem::exists(m.folder / "best.safetensors"));
    const auto resumed = m.sweep(counting, options, "a");
    CHECK(resumed.code == 0);
    CHECK(m.table() == std::vector<std::string>{"lambda,score", "0.1,1", "0.2,2", "0.3,4", "0.4,5"});
    CHECK(resumed.out.find("lambda=0.4 score=5") != std::string::npos);
    CHECK(resumed.err.find("2 points of 4") != std::string::npos);
    CHECK(slurp(m.folder / "calls") == "x\nx\nx\nx\nx\n");
    // Nothing left to do is no error.
    CHECK(m.sweep(counting, options, "a").code == 0);
    CHECK(slurp(m.folder / "calls") == "x\nx\nx\nx\nx\n");
}

TEST_CASE("bad input: one line that names what is wrong")
{
    const sweep_models m;
    spill(m.folder / "other.csv", "density,lambda,score\n0.1,1,5\n");
    spill(m.folder / "broken.csv", "lambda,score\n0.1,high\n");
    const auto names = m.folder.names();
    struct bad {
        std::string score;
        std::vector<std::string> arguments;
        std::vector<std::string> parts;
        int code = 1;
    };
    const std::vector<bad> cases{
        {"true {}", {"--lambdas", "0.5"}, {"printed no number", "lambda=0.5"}},
        {"echo accuracy unknown {} > /dev/null; echo v2", {"--lambdas", "0.5"}, {"printed no number"}},
        {"echo epoch 3 nan; : {}", {"--lambdas", "0.5"}, {"nan", "finite"}},
        {"kill -9 $$; : {}", {"--lambdas", "0.5"}, {"signal 9"}},
        {"no-such-command-at-all {} 2> /dev/null", {"--lambdas", "0.5"}, {"code 127"}},
        {"sleep 60; echo 1 {}", {"--lambdas", "0.5", "--timeout", "0.2"}, {"0.2 s", "lambda=0.5", "--timeout"}},
        {"exec > /dev/null; sleep 60; : {}", {"--lambdas", "0.5", "--timeout", "0.2"}, {"0.2 s"}},
        {"echo 1 {}", {"--lambdas", "0.5", "--timeout", "-1"}, {"--timeout"}, 2},
        {"echo 1", {"--lambdas", "0.5"}, {"{}"}, 2},
        {digest, {"--lambdas", "a"}, {"--lambdas", "'a'"}, 2},
        {digest, {"--lambdas", "0:1"}, {"--lambdas"}, 2},
        {digest, {"--lambdas", "0:1:0"}, {"--lambdas"}, 2},
        {digest, {"--lambdas", "1:0:0.1"}, {"--lambdas"}, 2},
        {digest, {"--lambdas", "0.1,,0.2"}, {"--lambdas"}, 2},
        {digest, {"--lambdas", "0.5", "--lambda", "1"}, {"exclude"}, 2},
        {digest, {"--densities", "0.5"}, {"density"}, 2},
        {digest, {"--method", "ties", "--densities", "0.5,1.5"}, {"--densities", "1.5"}, 2},
        {digest, {"--over", "alpha=0.1"}, {"alpha"}, 2},
        {digest, {"--over", "lambda"}, {"--over", "'lambda'"}, 2},
        {digest, {"--method", "average"}, {"--subsets"}, 2},
        {digest, {"--subsets", "--smallest", "4"}, {"--subsets"}, 2},
        {digest, {"--lambdas", "1", "--jobs", "0"}, {"--jobs"}, 2},
        {digest, {"--lambdas", "1", "--jobs", "-1"}, {"--jobs", "'-1'"}, 2},
        {digest, {"--lambdas", "1", "--jobs", "99999999999999999999"}, {"--jobs", "'99999999999999999999'"}, 2},
        {digest, {"--subsets", "--smallest", "-1"}, {"--smallest", "'-1'"}, 2},
        {digest, {"--lambdas", "1", "--csv", "other.csv"}, {"other.csv", "density,lambda"}},
        {digest, {"--lambdas", "0.1", "--csv", "broken.csv"}, {"broken.csv", "line 2", "high"}},
        {digest, {"--lambdas", "1", "--csv", "no/folder/s.csv"}, {"no/folder"}},
        {digest, {"--lambdas", "1", "--scratch", "no/folder"}, {"no/folder"}},
        {digest, {"--task", "absent", "--lambdas", "1"}, {"absent"}},
        {digest, {"--lambda-per-task", "0:1:0.01"}, {"100000", "lorahub"}, 2},
        {digest, {"--lambda-per-task", "0,1", "--lambda", "1"}, {"--lambda ", "exclude"}, 2},
        {digest, {"--lambda-per-task", "0,1", "--subsets"}, {"--subsets", "exclude"}, 2},
        {digest, {"--lambda-per-task", "0,1", "--task", "b.safetensors=2"}, {"weight 2", "b.safetensors"}, 2},
        {digest, {"--lambda-per-task", "0,1", "--method", "average"}, {"average", "lambda"}, 2},
    };
    for (const auto& [score, arguments, parts, code] : cases) {
        const auto result = m.sweep(score, arguments);
        CAPTURE_BOUND(score);
        CAPTURE(result.err);
        CHECK(result.code == code);
        CHECK(is_error_line(result.err));
        for (const auto& part : parts) { CHECK(result.err.find(part) != std::string::npos); }
        CHECK(m.folder.names() == names);
    }
    CHECK(slurp(m.folder / "broken.csv") == "lambda,score\n0.1,high\n");
    const auto dry = m.sweep("touch called; echo 1 {}", {"--csv", "dry.csv", "--dry-run"});
    CHECK(dry.code == 0);
    CHECK(dry.out.find("21 candidates") != std::string::npos);
    CHECK(m.folder.names() == names);
}

TEST_CASE("a table begins with its first score: a search that fails before has made none")
{
    const sweep_models m;
    const auto names = m.folder.names();
    for (const std::string score : {"false {}", "echo none {} > /dev/null"}) {
        CHECK(m.sweep(score, {"--lambdas", "0,1", "--csv", "s.csv", "--jobs", "2"}).code == 1);
        CHECK(m.folder.names() == names);
    }
    // What was there stays as it was.
    spill(m.folder / "s.csv", "lambda,score\n");
    CHECK(m.sweep("false {}", {"--lambdas", "0,1", "--csv", "s.csv"}).code == 1);
    CHECK(slurp(m.folder / "s.csv") == "lambda,score\n");
    CHECK(m.sweep("test $TASKVEC_LAMBDA = 0 && echo 3 {}", {"--lambdas", "0,1", "--csv", "s.csv"}).code == 1);
    CHECK(slurp(m.folder / "s.csv") == "lambda,score\n0,3\n");
}

TEST_CASE("an interrupt stops the command with all that it started, and removes the candidate")
{
    const sweep_models m;
    process sweeping(m.folder,
        m.command("sh -c 'echo $$ > pid.new; mv pid.new pid; sleep 60'; echo 1 {}", {"--csv", "s.csv"}),
        {"TMPDIR=" + (m.folder / "tmp").string()});
    while (!std::filesystem::exists(m.folder / "pid") && !sweeping.ended()) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    const auto child = static_cast<pid_t>(std::stol(slurp(m.folder / "pid")));
    sweeping.send(SIGTERM);
    const auto result = sweeping.wait();
    CHECK(result.code == 1);
    CHECK(result.err.find("interrupted") != std::string::npos);
    CHECK(std::filesystem::is_empty(m.folder / "tmp"));
    for (int i = 0; i < 500 && runs(child); ++i) { std::this_thread::sleep_for(std::chrono::milliseconds(10)); }
    CHECK_FALSE(runs(child));
    CHECK_FALSE(std::filesystem::exists(m.folder / "s.csv")); // nothing was scored
}

TEST_CASE("a sweep that is killed keeps what it had, and the next one goes on from there")
{
    const sweep_models m;
    const std::string score = "echo x >> calls; test $(wc -l < calls) -ne 3 || { echo $$ > pid.new; mv pid.new pid; "
                              "exec sleep 60; }; : {}; wc -l < calls";
    const std::vector<std::string> options{"--lambdas", "0.1,0.2,0.3,0.4", "--csv", "s.csv"};
    const auto command = m.command(score, options, "a");
    process sweeping(m.folder, command, {"TMPDIR=" + (m.folder / "tmp").string()});
    while (!std::filesystem::exists(m.folder / "pid") && !sweeping.ended()) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    sweeping.send(SIGKILL);
    CHECK(sweeping.wait().code == -SIGKILL);
    ::kill(-static_cast<pid_t>(std::stol(slurp(m.folder / "pid"))), SIGKILL); // what nobody ended
    CHECK(m.table() == std::vector<std::string>{"lambda,score", "0.1,1", "0.2,2"});
    const auto resumed = run(m.folder, command, {"TMPDIR=" + (m.folder / "tmp").string()});
    CAPTURE(resumed.err);
    CHECK(resumed.code == 0);
    CHECK(m.table() == std::vector<std::string>{"lambda,score", "0.1,1", "0.2,2", "0.3,4", "0.4,5"});
    CHECK(slurp(m.folder / "calls") == "x\nx\nx\nx\nx\n");
}

TEST_CASE("a sweep takes values by tensor beside its grid, and says what has no effect and what is no grid")
{
    const sweep_models m;
    const auto mixed = m.sweep(digest, {"--lambda", "0.5", "--lambda", "layers.0=1", "--csv", "s.csv"}, "ab");
    CAPTURE(mixed.err);
    REQUIRE(mixed.code == 0);
    CHECK(m.table()[1]
        == "0.5," + m.score_of({"--method", "task-arithmetic", "--lambda", "0.5", "--lambda", "layers.0=1"}, "ab"));
    const auto refuses = [&](const std::vector<std::string>& more, const std::string& because) {
        refused(m.folder, m.command("test -f {} && echo 1", more, "ab"), 2, because);
    };
    refuses({"--lambda", "0,1"}, "--lambda '0,1' would be spread over the layers");
    refuses({"--lambdas", "0:1:1e-9"}, "more than 100000 values");
    refuses({"--lambdas", "0.5", "--device", "cuda"}, "--device cuda");
    const auto noted =
        m.sweep("test -f {} && echo 1", {"--lambdas", "0.5", "--smallest", "1", "--report", "r.json"}, "ab");
    CHECK(noted.err.find("--smallest has no effect without --subsets") != std::string::npos);
    const auto report = nlohmann::json::parse(slurp(m.folder / "r.json"));
    CHECK(report["bytes_read"] > 0);
    CHECK(report["bytes_written"] > 0);
}

TEST_CASE("a sweep's outputs are checked before the first candidate, and in a dry run")
{
    const sweep_models m;
    for (const auto& outputs :
        std::vector<std::vector<std::string>>{{"--out", "absent/o.safetensors"}, {"--csv", "absent/c.csv"},
            {"--report", "absent/r.json"}, {"--svg", "absent/s.svg"}, {"--scratch", "absent"}}) {
        auto more = outputs;
        more.insert(more.end(), {"--lambdas", "0.5"});
        auto words = m.command("touch scored; test -f {} && echo 1", more, "ab");
        CAPTURE(outputs[0]);
        refused(m.folder, words, 1, "absent");
        words.emplace_back("--dry-run");
        refused(m.folder, words, 1, "absent");
    }
}
