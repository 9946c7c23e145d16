// taskvec combine-statistics: Fishers or Grams over parts of a task's data become one file.
// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"
#include "words.hpp"

#include <taskvec/formats/statistics.hpp>

#include <memory>

namespace {

struct combine_statistics_settings {
    std::vector<std::string> parts;
    std::string out;
};

void combine(const combine_statistics_settings& given)
{
    const auto say = [&](const taskvec::statistics_info& info, std::size_t tensors) {
        tool::print("joined " + tool::counted(given.parts.size(), "part") + " into '" + tool::printable(given.out)
            + "': " + std::string(to_string(info.kind)) + " of " + tool::counted(tensors, "tensor") + " over "
            + tool::counted(info.examples, "example") + "\n");
    };
    taskvec::combine_statistics(
        {given.parts.begin(), given.parts.end()}, given.out, taskvec::durability::synchronised, say);
    tool::outputs_are_there();
}

const tool::register_verb combine_statistics_verb(110, "combine-statistics",
    "Join Fishers or Gram matrices of one model over parts of its data", [](tool::command& verb) {
        const auto given = std::make_shared<combine_statistics_settings>();
        verb.texts("--part", given->parts, "FILE", "A statistics file; repeat", tool::presence::required);
        verb.text("--out", given->out, "FILE", "Where the joined statistics go; may be one of the parts",
            tool::presence::required);
        verb.footer("Grams add up; Fishers are means weighted by their numbers of examples.\n\nExample:\n"
                    "  taskvec combine-statistics --part math.0.gram.safetensors --part math.1.gram.safetensors "
                    "--out math.gram.safetensors");
        verb.action([given] { combine(*given); });
    });

} // namespace
