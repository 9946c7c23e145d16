"""taskvec's documented semantics restated in NumPy: slow, obvious, one rounding at a time.

A model is a dict of torch tensors (the storage types); arithmetic is NumPy f32 (f64 for f64 tensors), each product and
each sum rounded separately, sums over tasks in task order.
"""
# SPDX-License-Identifier: Apache-2.0
import numpy as np

from common import by_name, narrow, wide


def kept_count(density, size):
    return max(1, int(np.floor(density * size))) if size and density > 0 else 0


def task_vector(base, task):
    return {name: wide(task[name]) - wide(base[name]) for name in base}


def _flat_magnitudes(vector, names):
    double = any(vector[name].dtype == np.float64 for name in names)
    parts = [np.abs(vector[name]).reshape(-1).astype(np.float64 if double else np.float32) for name in names]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _scopes(vector, scope):
    return [by_name(vector)] if scope == "model" else [[name] for name in by_name(vector)]


def tied_at_threshold(vector, density, scope):
    """True when the last kept and the first dropped magnitude are equal and not zero, in any scope."""
    for names in _scopes(vector, scope):
        magnitudes = np.sort(_flat_magnitudes(vector, names))[::-1]
        k = kept_count(density, magnitudes.size)
        if 0 < k < magnitudes.size and magnitudes[k - 1] == magnitudes[k] != 0:
            return True
    return False


def trim(vector, density, scope, rule="exact"):
    """Zeros all but the top `density`. rule 'exact': k entries, lowest index first among equals.

    rule 'ties-merging': every entry not below the (n - int(density n))-th smallest magnitude; density 1 keeps all.
    """
    result = {name: np.zeros_like(value) for name, value in vector.items()}
    for names in _scopes(vector, scope):
        magnitudes = _flat_magnitudes(vector, names)
        mask = np.zeros(magnitudes.size, bool)
        if rule == "exact":
            order = np.argsort(-magnitudes.astype(np.float64), kind="stable")
            mask[order[: kept_count(density, magnitudes.size)]] = True
        else:
            dropped = magnitudes.size - int(density * magnitudes.size)
            mask[:] = True if dropped == 0 else magnitudes >= np.sort(magnitudes)[dropped - 1]
        offset = 0
        for name in names:
            size = vector[name].size
            part = mask[offset : offset + size].reshape(vector[name].shape)
            result[name] = np.where(part, vector[name], np.zeros_like(vector[name]))
            offset += size
    return result


def ordered_sum(terms):
    total = terms[0].copy()
    for term in terms[1:]:
        total = total + term
    return total


def ties_vector(vectors, weights, density, scope="model", merge="mean", zero_sign="majority", rule="exact", election="weighted", divisor="weights",
                unresolved=0, agreement="trimmed"):
    """The merged task vector. `unresolved` is the sign that an unresolved majority stands for (0: the entry merges to 0).

    `agreement`: whose sign must be the elected one: the trimmed value's, or the 'weighted' value's (they differ where a weight is negative).
    """
    kept = [trim(vector, density, scope, rule) for vector in vectors]
    names = by_name(kept[0])
    gamma, factor = {}, {}
    for name in names:
        kind = kept[0][name].dtype.type
        if election == "frequency":
            sums = ordered_sum([np.sign(vector[name]) for vector in kept])
        else:
            sums = ordered_sum([vector[name] * kind(weight if election == "weighted" else 1) for vector, weight in zip(kept, weights)])
        gamma[name] = np.sign(sums)
    for group in _scopes(kept[0], scope):
        majority = np.sign(sum(int(gamma[name].sum(dtype=np.float64)) for name in group))
        for name in group:
            factor[name] = gamma[name]
            if zero_sign != "none":
                fallback = 1 if zero_sign == "positive" else majority if majority != 0 else unresolved
                gamma[name] = np.where(gamma[name] == 0, gamma[name].dtype.type(fallback), gamma[name])
                # ties-merging selects the negative entries where its majority is 0, but its max multiplies by that 0.
                factor[name] = factor[name] if zero_sign == "majority" and majority == 0 else gamma[name]
    merged = {}
    for name in names:
        kind = kept[0][name].dtype.type
        elected = gamma[name]
        voices = [vector[name] * kind(weight if agreement == "weighted" else 1) for vector, weight in zip(kept, weights)]
        agrees = [(np.sign(voice) == elected) & (voice != 0) for voice in voices]
        products = [np.where(agree, vector[name] * kind(weight), kind(0)) for vector, weight, agree in zip(kept, weights, agrees)]
        if merge == "max":
            merged[name] = np.abs(np.stack(products)).max(axis=0) * factor[name]
            continue
        total = ordered_sum(products)
        if merge == "mean":
            if divisor == "count":
                below = np.maximum(ordered_sum([agree.astype(kind) for agree in agrees]), kind(1))
            else:
                below = ordered_sum([np.where(agree, kind(weight), kind(0)) for weight, agree in zip(weights, agrees)])
                below = np.where(below == 0, kind(1), below)
            total = total / below
        merged[name] = total
    return merged


def add(base, vector, lam):
    """base + lam * vector, rounded once to the base's dtype."""
    return {name: narrow(wide(value) + vector[name].dtype.type(lam) * vector[name], value.dtype) for name, value in base.items()}


def ties(base, tasks, weights, density, lam=1.0, **options):
    return add(base, ties_vector([task_vector(base, task) for task in tasks], weights, density, **options), lam)


AS_IN_TIES_MERGING = dict(scope="model", rule="ties-merging", divisor="count", zero_sign="majority", unresolved=-1)
AS_IN_MERGEKIT = dict(scope="tensor", zero_sign="positive", divisor="weights", agreement="weighted")
AS_IN_PEFT = dict(scope="tensor", zero_sign="positive", election="unweighted", divisor="count")


def task_arithmetic(base, tasks, weights, lam):
    vectors = [task_vector(base, task) for task in tasks]
    total = {name: ordered_sum([vector[name] * vector[name].dtype.type(weight) for vector, weight in zip(vectors, weights)]) for name in base}
    return add(base, total, lam)


def average(tasks, weights):
    result = {}
    for name, first in tasks[0].items():
        kind = wide(first).dtype.type
        total = ordered_sum([wide(task[name]) * kind(weight) for task, weight in zip(tasks, weights)])
        below = kind(0)
        for weight in weights:
            below = below + kind(weight)
        result[name] = narrow(total / below, first.dtype)
    return result


def pruned_delta(base, task, density, scope="model"):
    """The top-m% of task - base: f32 (f64 for f64) values, zero where dropped."""
    return trim(task_vector(base, task), density, scope)


def slerp(first, second, t):
    result = {}
    for name in first:
        a, b = wide(first[name]).astype(np.float64), wide(second[name]).astype(np.float64)
        na, nb = np.linalg.norm(a), np.linalg.norm(b)
        cosine = 2.0 if na == 0 or nb == 0 else float(np.clip((a / na * (b / nb)).sum(), -1, 1))
        if abs(cosine) > 0.9995:
            value = (1 - t) * a + t * b
        else:
            angle = np.arccos(cosine)
            value = np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b
        result[name] = narrow(value.astype(wide(first[name]).dtype), first[name].dtype)
    return result


def model_stock(base, tasks, clamp=True):
    result = {}
    count = len(tasks)
    for name in base:
        vectors = [wide(task[name]).astype(np.float64) - wide(base[name]) for task in tasks]
        norms = [np.linalg.norm(vector) for vector in vectors]
        cosines = [
            0.0 if norms[i] == 0 or norms[j] == 0 else float((vectors[i] * vectors[j]).sum() / (norms[i] * norms[j]))
            for i in range(count) for j in range(i + 1, count)
        ]
        cosine = float(np.mean(cosines))
        t = count * cosine / (1 + (count - 1) * cosine)
        if clamp:
            t = min(1.0, max(0.0, t))
        value = wide(base[name]) + t * sum(vectors) / count
        result[name] = narrow(value.astype(wide(base[name]).dtype), base[name].dtype)
    return result


def along(value, vectors):
    """An array whose last axis has the vectors whose angles count."""
    if vectors == "tensors" or value.ndim < 2:
        return value.reshape(1, -1)
    return value if vectors == "rows" else np.moveaxis(value, 0, -1)


def back(value, shape, vectors):
    return np.moveaxis(value, -1, 0).reshape(shape) if vectors == "columns" and len(shape) > 1 else value.reshape(shape)


def nuslerp(base, tasks, weights, vectors):
    """Between two task vectors, by the angle of whole tensors, of each row or of each column."""
    t, result = weights[1] / sum(weights), {}
    for name in base:
        a, b = (along(wide(task[name]).astype(np.float64) - wide(base[name]), vectors) for task in tasks)
        norms = np.maximum(np.linalg.norm(a, axis=-1), 1e-7) * np.maximum(np.linalg.norm(b, axis=-1), 1e-7)
        cosine = np.clip((a * b).sum(-1) / norms, -1, 1)[..., None]
        straight = 1 - cosine**2 <= 1e-14
        angle = np.arccos(np.where(straight, 0.5, cosine))
        first, second = (np.where(straight, s, np.sin(s * angle) / np.sin(angle)) for s in (1 - t, t))
        value = wide(base[name]) + back(first * a + second * b, base[name].shape, vectors)
        result[name] = narrow(value.astype(wide(base[name]).dtype), base[name].dtype)
    return result


def model_stock_of_rows(base, tasks):
    """As model_stock, unclamped, with a ratio for each row: 0 where its task vectors cancel."""
    result, count = {}, len(tasks)
    for name in base:
        rows = [along(wide(task[name]).astype(np.float64) - wide(base[name]), "rows") for task in tasks]
        norms = [np.linalg.norm(row, axis=-1) for row in rows]
        cosines = [np.where(norms[i] * norms[j] == 0, 0, (rows[i] * rows[j]).sum(-1) / np.maximum(norms[i] * norms[j], 1e-300))
                   for i in range(count) for j in range(i + 1, count)]
        cosine = np.mean(cosines, axis=0)[..., None]
        below = 1 + (count - 1) * cosine
        ratio = np.where(below < 1e-6, 0, count * cosine / np.where(below < 1e-6, 1, below))
        value = wide(base[name]) + (ratio * sum(rows) / count).reshape(base[name].shape)
        result[name] = narrow(value.astype(wide(base[name]).dtype), base[name].dtype)
    return result


def fisher(tasks, fishers, weights, normalize=False, floor=1e-12):
    """f64 throughout; the result is rounded once."""
    scales = []
    for diagonal in fishers:
        norm = np.sqrt(sum(float((wide(value).astype(np.float64) ** 2).sum()) for value in diagonal.values()))
        scales.append(1.0 / norm if normalize else 1.0)
    result = {}
    for name, first in tasks[0].items():
        coefficients = [weight * scale * wide(diagonal[name]).astype(np.float64) for weight, scale, diagonal in zip(weights, scales, fishers)]
        values = [wide(task[name]).astype(np.float64) for task in tasks]
        below = sum(coefficients)
        above = sum(c * v for c, v in zip(coefficients, values))
        plain = sum(w * v for w, v in zip(weights, values)) / sum(weights)
        merged = np.where(below < floor, plain, above / np.where(below < floor, 1.0, below))
        result[name] = narrow(merged.astype(wide(first).dtype), first.dtype)
    return result


def regmean(weights_in_out, grams, alpha):
    """(sum G~)^-1 sum G~ W in f64, G~ = alpha G + (1 - alpha) diag(G). Weights are in x out."""
    scaled = [alpha * gram + (1 - alpha) * np.diag(np.diag(gram)) for gram in grams]
    return np.linalg.solve(sum(scaled), sum(gram @ weight for gram, weight in zip(scaled, weights_in_out)))
