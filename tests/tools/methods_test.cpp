// taskvec methods: what the tables say, and the page of documentation that is made from them.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include "../capture.hpp"

using namespace tools_test;

TEST_CASE("docs/methods.md is what the tables say")
{
    const scratch folder;
    const auto page = run(folder, {"methods", "--markdown"});
    CHECK(page.code == 0);
    CHECK(page.err.empty());
    const std::string documented = slurp(std::string(TASKVEC_TEST_DIR) + "/../docs/methods.md");
    INFO("mend by: taskvec methods --markdown > docs/methods.md");
    CHECK(page.out == documented);
}

TEST_CASE("every option of every method has its flag in the help of merge, with its default")
{
    const scratch folder;
    const auto help = run(folder, {"merge", "--help"});
    for (const char* flag : {"--density D", "--lambda X", "--scope SCOPE", "--semantics WHOSE", "--merge-weights HOW",
             "--seed N", "--zero-sign SIGN", "--trim RULE", "--unweighted-election", "--divide-by-count",
             "--agree-when-weighted", "--negative-weights", "--fisher FILE", "--gram FILE", "--normalize", "--floor X",
             "--alpha X", "--ridge X", "--conv1d REGEX", "--t X", "--unclamped"}) {
        CAPTURE(flag);
        CHECK(help.out.find(std::string("\n  ") + flag) != std::string::npos);
    }
    const auto one = run(folder, {"methods", "--method", "slerp"});
    CHECK(one.out.find("--t X  how far to go") != std::string::npos);
    CHECK(one.out.find("default 0.5") != std::string::npos);
    CHECK(run(folder, {"methods", "--method", "nonsense"}).code == 2);
}

TEST_CASE("options that only C++ had are options of the command line")
{
    const scratch folder;
    const auto base = sample_base();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "a.safetensors", sample_task(base, 2));
    write_values(folder / "b.safetensors", sample_task(base, 3));
    const auto merge = [&](const std::vector<std::string>& more) {
        std::vector<std::string> arguments{"merge", "--method", "ties", "--base", "base.safetensors", "--task",
            "a.safetensors", "--task", "b.safetensors=0.5", "--out", "o", "--report", "r.json"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        CHECK(run(folder, arguments).code == 0);
        return slurp(folder / "o");
    };
    // A preset is a set of values, and what is given beside it wins, in either order.
    const auto peft = merge({"--semantics", "peft"});
    CHECK(peft
        == merge({"--scope", "tensor", "--zero-sign", "positive", "--unweighted-election", "--divide-by-count",
            "--negative-weights"}));
    CHECK(peft != merge({"--semantics", "peft", "--scope", "model"}));
    CHECK(merge({"--scope", "model", "--semantics", "peft"}) == merge({"--semantics", "peft", "--scope", "model"}));
    merge({"--semantics", "peft", "--density", "0.4"});
    const auto report = slurp(folder / "r.json");
    for (const char* part : {"\"density\": 0.4", "\"scope\": \"tensor\"", "\"divide_by_count\": true",
             "\"weighted_election\": false", "\"semantics\": \"peft\""}) {
        CAPTURE(part);
        CHECK(report.find(part) != std::string::npos);
    }
}

TEST_CASE("mergekit's names of methods do what ours do, and reports say ours")
{
    const scratch folder;
    const auto base = sample_base();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "a.safetensors", sample_task(base, 2));
    write_values(folder / "b.safetensors", sample_task(base, 3));
    const auto by = [&](std::vector<std::string> words) {
        words.insert(words.end(),
            {"--base", "base.safetensors", "--task", "a.safetensors", "--task", "b.safetensors=0.5", "--out", "o",
                "--report", "r.json"});
        std::filesystem::remove_all(folder / "o");
        const auto done = run(folder, words);
        CAPTURE(words[2]);
        CAPTURE(done.err);
        CHECK(done.code == 0);
    };
    const std::vector<std::pair<std::string, std::string>> names{
        {"linear", "average"}, {"multislerp", "multi-slerp"}, {"dare-linear", "dare"}};
    for (const auto& [alias, name] : names) {
        CAPTURE_BOUND(alias);
        by({"merge", "--method", name});
        const auto expected = slurp(folder / "o");
        by({"merge", "--method", alias});
        CHECK(slurp(folder / "o") == expected);
        CHECK(slurp(folder / "r.json").find("\"method\": \"" + name + "\"") != std::string::npos);
        by({"peru-fft", "--method", alias, "--density", "0.1"});
        CHECK(slurp(folder / "o/merged.safetensors") == expected);
        CHECK(slurp(folder / "r.json").find("\"method\": \"" + name + "\"") != std::string::npos);
        const auto listed = run(folder, {"methods", "--method", alias});
        CHECK(listed.out == run(folder, {"methods", "--method", name}).out);
        CHECK(listed.out.find("The same: --method " + alias + ".") != std::string::npos);
        CHECK(run(folder, {"completion", "bash"}).out.find(" " + alias) != std::string::npos);
    }
    const auto swept = run(folder,
        {"sweep", "--method", "dare-linear", "--densities", "0.5", "--base", "base.safetensors", "--task",
            "a.safetensors", "--score", "true {}; echo 1", "--csv", "s.csv", "--report", "r.json"});
    CAPTURE(swept.err);
    CHECK(swept.code == 0);
    CHECK(slurp(folder / "r.json").find("\"method\": \"dare\"") != std::string::npos);
    const auto wrong = run(folder, {"merge", "--method", "linea", "--task", "a.safetensors", "--out", "o"});
    CHECK(wrong.code == 2);
    CHECK(wrong.err.find("linear") != std::string::npos);
}
