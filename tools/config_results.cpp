// Results of a configuration's documents that others take.
// SPDX-License-Identifier: Apache-2.0
#include "config_results.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/models/operand_source.hpp>

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

namespace tool::configuration {

namespace {

/// What says whose result it is about: that of the document that overflows, not of those that read it.
class result_error final : public taskvec::nonfinite_error {
public:
    using nonfinite_error::nonfinite_error;
};

template <class Function>
void say_whose(const std::string& name, const Function& work)
{
    try {
        work();
    }
    catch (const result_error&) {
        throw;
    }
    catch (const taskvec::nonfinite_error& wrong) {
        if (wrong.code() != taskvec::error_code::result_overflow) { throw; }
        taskvec::raise<result_error>(wrong.code(), "the result of '" + name + "': " + wrong.what());
    }
}

class result_source final : public taskvec::operand_source {
public:
    result_source(std::string name, const taskvec::operand_source& of)
        : name_(std::move(name))
        , of_(of)
    { }
    [[nodiscard]] taskvec::dtype type() const noexcept override { return of_.type(); }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        say_whose(name_, [&] { of_.read(offset, count, out); });
    }
    void prepare(const taskvec::cpu& policy) const override
    {
        say_whose(name_, [&] { of_.prepare(policy); });
    }
    void release() const override { of_.release(); }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return of_.stored_bits(); }

private:
    std::string name_;
    const taskvec::operand_source& of_;
};

struct named_result {
    std::shared_ptr<const taskvec::const_model_ref> result;
    std::map<const taskvec::operand_source*, result_source> sources{}; ///< what is one matrix stays one
    taskvec::const_model_ref model{};
};

} // namespace

void as_result_of(const std::string& name, const std::function<void()>& merge)
{
    say_whose(name, merge);
}

std::shared_ptr<const taskvec::const_model_ref> as_result_of(
    const std::string& name, const std::shared_ptr<const taskvec::const_model_ref>& result)
{
    const auto named = std::make_shared<named_result>();
    named->result = result;
    for (const auto& [tensor_name, tensor] : *result) {
        auto changed = tensor;
        if (const auto* const source = tensor.source) {
            changed.source = &named->sources.try_emplace(source, name, *source).first->second;
        }
        named->model.insert(tensor_name, changed);
    }
    return {named, &named->model};
}

} // namespace tool::configuration
