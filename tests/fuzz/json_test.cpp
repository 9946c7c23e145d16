// Any text is JSON, an index of shards, a configuration with quantised layers, or refused.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/checkpoint.hpp>

TASKVEC_FUZZ_TARGET(json)
{
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    fuzz::read([&] {
        const auto value = taskvec::parse_json(text, "fuzzed");
        // What is read is read again from what it is written as.
        const auto written = value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
        fuzz::expect(taskvec::parse_json(written, "written") == value, "JSON that is not what it was written as");
    });
    const fuzz::memory_file file(text);
    fuzz::read([&] {
        for (const auto& [name, shard] : taskvec::read_index(file.path())) {
            fuzz::expect(shard.find('/') == shard.npos && shard != "..", "a shard outside its directory");
        }
    });
    fuzz::read([&] { (void)taskvec::read_quantisation_hints(file.path()); });
}
