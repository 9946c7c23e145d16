// SPDX-License-Identifier: Apache-2.0
#include "curves.hpp"

#include "figures.hpp"

#include <algorithm>

namespace digits {

double lambda_curves::add(std::string_view method, double lambda, const encoder& model, const setting& s)
{
    auto place = std::ranges::find(curves_, method, &curve::method);
    if (place == curves_.end()) { place = curves_.insert(place, curve{std::string(method), {}}); }
    point& here = place->points[lambda];
    here.validation.push_back(mean(evaluate(model, s.base.head, s.validation)));
    here.test.push_back(mean(evaluate(model, s.base.head, s.test)));
    return here.validation.back();
}

void lambda_curves::write(
    const std::filesystem::path& csv, const std::filesystem::path& svg, const std::string& title) const
{
    std::string lines = "method,lambda,validation,test\n";
    plot::line_chart chart{.title = title,
        .x_label = "λ: scale of the merged task vector",
        .y_label = "test accuracy, percent, mean of eight tasks",
        .curves = {}};
    for (const auto& [method, points] : curves_) {
        plot::curve line{.label = method, .x = {}, .y = {}};
        for (const auto& [lambda, values] : points) {
            const double test = over_seeds(values.test).mean;
            lines += taskvec::message(
                method, ',', lambda, ',', percent(over_seeds(values.validation).mean), ',', percent(test), '\n');
            line.x.push_back(lambda);
            line.y.push_back(100 * test);
        }
        chart.curves.push_back(std::move(line));
    }
    write_text(csv, lines);
    draw(chart, svg);
}

} // namespace digits
