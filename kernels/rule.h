// An optimizer's update of elements that have a gradient: src/optimizer UpdateRule::apply.
//
// SGD:   m = momentum * m + (g + weight_decay * w)
//        w -= learning_rate * m
// AdamW: m = beta1 * m + one_minus_beta1 * g
//        v = beta2 * v + one_minus_beta2 * g^2
//        w -= decay_factor * w + corrected_rate * m / (sqrt(v) * sqrt_v_scale + epsilon)
//
// Each operation is rounded by itself, as on the CPU: a row has the same bits whichever kernel
// updates it.
#pragma once

#include "ptx/arithmetic.h"
#include "ptx/memory.h"
#include "shared_structs.h"

namespace rule {

PFC_DEVICE void sgd(const Rule& rule, float& w, float& m, float g) {
    m = ptx::add(ptx::multiply(rule.momentum, m), ptx::add(g, ptx::multiply(rule.weight_decay, w)));
    w = ptx::subtract(w, ptx::multiply(rule.learning_rate, m));
}

PFC_DEVICE void adamw(const Rule& rule, float& w, float& m, float& v, float g) {
    m = ptx::add(ptx::multiply(rule.beta1, m), ptx::multiply(rule.one_minus_beta1, g));
    v = ptx::add(ptx::multiply(rule.beta2, v),
                 ptx::multiply(rule.one_minus_beta2, ptx::multiply(g, g)));
    const float size =
        ptx::add(ptx::multiply(ptx::square_root(v), rule.sqrt_v_scale), rule.epsilon);
    // One small term, subtracted once: w * (1 - decay) would round the decay away.
    w = ptx::subtract(w, ptx::add(ptx::multiply(rule.decay_factor, w),
                                  ptx::divide(ptx::multiply(rule.corrected_rate, m), size)));
}

// The same for the elements that a thread holds of a row.
PFC_DEVICE void sgd(const Rule& rule, ptx::Float2& w, ptx::Float2& m, const ptx::Float2& g) {
    sgd(rule, w.x, m.x, g.x);
    sgd(rule, w.y, m.y, g.y);
}

PFC_DEVICE void sgd(const Rule& rule, ptx::Float4& w, ptx::Float4& m, const ptx::Float4& g) {
    sgd(rule, w.x, m.x, g.x);
    sgd(rule, w.y, m.y, g.y);
    sgd(rule, w.z, m.z, g.z);
    sgd(rule, w.w, m.w, g.w);
}

PFC_DEVICE void adamw(const Rule& rule, ptx::Float2& w, ptx::Float2& m, ptx::Float2& v,
                      const ptx::Float2& g) {
    adamw(rule, w.x, m.x, v.x, g.x);
    adamw(rule, w.y, m.y, v.y, g.y);
}

PFC_DEVICE void adamw(const Rule& rule, ptx::Float4& w, ptx::Float4& m, ptx::Float4& v,
                      const ptx::Float4& g) {
    adamw(rule, w.x, m.x, v.x, g.x);
    adamw(rule, w.y, m.y, v.y, g.y);
    adamw(rule, w.z, m.z, v.z, g.z);
    adamw(rule, w.w, m.w, v.w, g.w);
}

// `so_far` is 0 while all elements were finite, and NaN from then on.
PFC_DEVICE float probe(float so_far, float element) { return so_far + element * 0.0f; }

PFC_DEVICE float probe(float so_far, const ptx::Float2& row) {
    return probe(probe(so_far, row.x), row.y);
}

PFC_DEVICE float probe(float so_far, const ptx::Float4& row) {
    return probe(probe(probe(probe(so_far, row.x), row.y), row.z), row.w);
}

// base^exponent by squaring: at most `exponent` roundings of a double, and unlike pow no stack.
PFC_DEVICE double power(double base, uint64_t exponent) {
    double result = 1.0;
    for (; exponent != 0; exponent >>= 1) {
        if (exponent & 1) {
            result *= base;
        }
        base *= base;
    }
    return result;
}

}  // namespace rule
