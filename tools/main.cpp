// The taskvec command line.
// SPDX-License-Identifier: Apache-2.0
#include "tool.hpp"

#include <exception>
#include <iostream>
#include <new>

#include <malloc.h>

namespace {

int fail(const std::string& what)
{
    std::cerr << "taskvec: error: " << tool::printable(what) << '\n';
    return 1;
}

/// Help in one style for all verbs: the usage line names the verb, examples keep their line breaks.
class formatter final : public CLI::Formatter {
public:
    formatter() { column_width(30); }
    std::string make_usage(const CLI::App* app, std::string) const override { return "Usage: " + usage_of(app) + "\n"; }
    static std::string usage_of(const CLI::App* app)
    {
        if (app->get_parent() == nullptr) { return "taskvec VERB [OPTIONS]"; }
        return "taskvec " + app->get_name() + make_required_usage(app) + " [OPTIONS]" + make_positionals_usage(app);
    }

private:
    static std::string make_required_usage(const CLI::App* app)
    {
        std::string text;
        for (const auto* option :
            app->get_options([](const CLI::Option* o) { return o->get_required() && !o->get_positional(); })) {
            text += " " + option->get_name() + " " + option->get_type_name();
        }
        return text;
    }
    static std::string make_positionals_usage(const CLI::App* app)
    {
        std::string text;
        for (const auto* option : app->get_options([](const CLI::Option* o) { return o->get_positional(); })) {
            text += " " + option->get_name(true);
        }
        return text;
    }
};

} // namespace

int main(int argc, char** argv)
{
#if defined(M_MMAP_THRESHOLD)
    // Large blocks go back to the system when they are freed; left alone, glibc soon keeps them, and --memory would be
    // passed.
    ::mallopt(M_MMAP_THRESHOLD, 128 * 1024);
#endif
    CLI::App app(
        "taskvec: merge, prune and reuse fine-tuned models, straight from their safetensors files.", "taskvec");
    app.formatter(std::make_shared<formatter>());
    app.set_version_flag("--version",
        "taskvec " + std::to_string(TASKVEC_VERSION_MAJOR) + "." + std::to_string(TASKVEC_VERSION_MINOR) + "."
            + std::to_string(TASKVEC_VERSION_PATCH));
    app.require_subcommand(1);
    app.option_defaults()->always_capture_default(false);
    app.footer("'taskvec VERB --help' explains a verb and gives an example.\n"
               "A MODEL is a .safetensors file, or a directory that holds model.safetensors "
               "or\nmodel.safetensors.index.json.");
    // Wrong usage: one line too, with the usage of the verb, as far as one was named.
    const auto misused = [&](const std::string& what) {
        const CLI::App* verb = &app;
        for (const auto* named : app.get_subcommands()) { verb = named; }
        fail(what + " (usage: " + formatter::usage_of(verb) + "; see 'taskvec"
            + (verb == &app ? "" : " " + verb->get_name()) + " --help')");
        return 2;
    };
    try {
        tool::add_verbs(app);
        app.parse(argc, argv);
        return 0;
    }
    catch (const CLI::Success& done) { // --help, --version
        return app.exit(done);
    }
    catch (const CLI::ParseError& wrong) {
        if (!app.get_subcommands().empty()) { return misused(wrong.what()); }
        const bool word = argc > 1 && argv[1][0] != '-';
        return misused(word ? "'" + std::string(argv[1]) + "' is none of the verbs" : "a verb is required");
    }
    catch (const tool::usage_error& wrong) {
        return misused(wrong.what());
    }
    catch (const taskvec::cancelled&) {
        return fail("interrupted; no output was written");
    }
    catch (const std::bad_alloc&) {
        return fail("out of memory: use fewer --threads or a smaller --memory");
    }
    catch (const std::exception& failure) { // taskvec::error, and whatever the system throws
        return fail(failure.what());
    }
}
