// The taskvec command line.
// SPDX-License-Identifier: Apache-2.0
#include "tool.hpp"

#include <exception>
#include <iostream>
#include <new>

namespace {

int fail(int code, const std::string& what)
{
    std::cerr << "taskvec: error: " << tool::printable(what) << '\n';
    return code;
}

/// Help in one style for all verbs: the usage line names the verb, examples keep their line breaks.
class formatter final : public CLI::Formatter {
public:
    formatter() { column_width(30); }
    std::string make_usage(const CLI::App* app, std::string) const override
    {
        const bool whole = app->get_parent() == nullptr;
        return "Usage: taskvec " + (whole ? std::string("VERB [OPTIONS]") : app->get_name() + " [OPTIONS]" + make_positionals_usage(app)) + "\n";
    }

private:
    static std::string make_positionals_usage(const CLI::App* app)
    {
        std::string text;
        for (const auto* option : app->get_options([](const CLI::Option* o) { return o->get_positional(); })) { text += " " + option->get_name(true); }
        return text;
    }
};

} // namespace

int main(int argc, char** argv)
{
    CLI::App app("taskvec: merge, prune and reuse fine-tuned models, straight from their safetensors files.", "taskvec");
    app.formatter(std::make_shared<formatter>());
    app.set_version_flag("--version",
        "taskvec " + std::to_string(TASKVEC_VERSION_MAJOR) + "." + std::to_string(TASKVEC_VERSION_MINOR) + "." + std::to_string(TASKVEC_VERSION_PATCH));
    app.require_subcommand(1);
    app.option_defaults()->always_capture_default(false);
    app.footer("'taskvec VERB --help' explains a verb and gives an example.\n"
               "A MODEL is a .safetensors file, or a directory that holds model.safetensors or\nmodel.safetensors.index.json.");
    std::string where;
    try {
        tool::add_verbs(app);
        app.parse(argc, argv);
        return 0;
    }
    catch (const CLI::Success& done) { // --help, --version
        return app.exit(done);
    }
    catch (const CLI::ParseError& wrong) {
        for (const auto* verb : app.get_subcommands()) { where = " " + verb->get_name(); }
        return fail(2, std::string(wrong.what()) + " (see 'taskvec" + where + " --help')");
    }
    catch (const tool::usage_error& wrong) {
        for (const auto* verb : app.get_subcommands()) { where = " " + verb->get_name(); }
        return fail(2, std::string(wrong.what()) + " (see 'taskvec" + where + " --help')");
    }
    catch (const taskvec::cancelled&) {
        return fail(1, "interrupted; no output was written");
    }
    catch (const std::bad_alloc&) {
        return fail(1, "out of memory: use fewer --threads or a smaller --memory");
    }
    catch (const std::exception& failure) { // taskvec::error, and whatever the system throws
        return fail(1, failure.what());
    }
}
