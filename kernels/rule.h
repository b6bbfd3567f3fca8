// What an update does to an element with a gradient: src/optimizer.rs StepRule::apply.
//
// SGD:   m = momentum * m + (g + weight_decay * w);  w -= learning_rate * m
// AdamW: m = beta1 * m + rest1 * g;  v = beta2 * v + rest2 * g^2;  w -= decay * w + rate * m /
// (sqrt(v) * root + epsilon)
//
// Each operation is rounded by itself, as on the CPU: a row has the same bits whichever kernel
// updates it.
#pragma once

#include "ptx/arithmetic.h"
#include "view.h"

namespace rule {

PFC_DEVICE void sgd(const Rule& step, float& w, float& m, float g) {
    m = ptx::add(ptx::multiply(step.momentum, m), ptx::add(g, ptx::multiply(step.weight_decay, w)));
    w = ptx::subtract(w, ptx::multiply(step.learning_rate, m));
}

PFC_DEVICE void adamw(const Rule& step, float& w, float& m, float& v, float g) {
    m = ptx::add(ptx::multiply(step.beta1, m), ptx::multiply(step.rest1, g));
    v = ptx::add(ptx::multiply(step.beta2, v), ptx::multiply(step.rest2, ptx::multiply(g, g)));
    const float size = ptx::add(ptx::multiply(ptx::square_root(v), step.root), step.epsilon);
    // One small term, subtracted once: w * (1 - decay) would round the decay away.
    w = ptx::subtract(
        w, ptx::add(ptx::multiply(step.decay, w), ptx::divide(ptx::multiply(step.rate, m), size)));
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
