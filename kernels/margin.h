// The margin on the target logit: src/margin.rs Margin::target and cosine, in double precision.
//
//     psi = cos(m1 * theta + m2) - m3,  psi' = m1 * sin(m1 * theta + m2) / max(sin(theta), 1e-4)
//
// Sine and cosine are our own. The library's take arguments of any size, through a table on the
// stack, while these angles are at most 17 pi. There ours differ from the library's by an ulp or
// two.
#pragma once

#include "ptx/shim.h"
#include "shared_structs.h"

namespace margin {

constexpr double kPi = 3.14159265358979323846;
constexpr double kHalfPi = 1.57079632679489661923;
constexpr double kLeastSine = 1e-4;

struct Turn {
    double sine, cosine;
};

PFC_DEVICE Turn turn(double angle) {
    // The nearest quarter turn, taken off in two parts: the first has 33 bits, so that small
    // multiples of it are exact.
    const double quarters = rint(angle * 0.63661977236758134308);
    const double rest =
        (angle - quarters * 1.57079632673412561417e+00) - quarters * 6.07710050650619224932e-11;
    const double z = rest * rest;
    // fdlibm's polynomials on [-pi/4, pi/4].
    double s = 1.58969099521155010221e-10;
    s = s * z - 2.50507602534068634195e-08;
    s = s * z + 2.75573137070700676789e-06;
    s = s * z - 1.98412698298579493134e-04;
    s = s * z + 8.33333333332248946124e-03;
    s = s * z - 1.66666666666666324348e-01;
    const double sine = rest + rest * z * s;
    double c = -1.13596475577881948265e-11;
    c = c * z + 2.08757232129817482790e-09;
    c = c * z - 2.75573143513906633035e-07;
    c = c * z + 2.48015872894767294178e-05;
    c = c * z - 1.38888888888741095749e-03;
    c = c * z + 4.16666666666666019037e-02;
    const double half = 0.5 * z, head = 1.0 - half;
    const double cosine = head + ((1.0 - head - half) + z * z * c);
    // A NaN fails both comparisons and stays one.
    const int quarter = quarters > -1e9 && quarters < 1e9 ? int(quarters) & 3 : 0;
    const double a = quarter & 1 ? cosine : sine, b = quarter & 1 ? sine : cosine;
    return Turn{quarter & 2 ? -a : a, (quarter + 1) & 2 ? -b : b};
}

// cos(theta), and exactly 0 at the angle of a row without direction: pi/2 itself is no double.
PFC_DEVICE double cosine(double theta) { return theta == kHalfPi ? 0.0 : turn(theta).cosine; }

struct Target {
    double logit;       // scale * psi
    double derivative;  // psi' by cos(theta), without the scale
};

// m1 * theta + m2, and 0 where that is below.
PFC_DEVICE double turned_angle(const MarginSettings& margin, double theta) {
    const double turned = margin.m1 * theta + margin.m2;
    return turned < 0.0 ? 0.0 : turned;  // a NaN stays
}

PFC_DEVICE Target target(const MarginSettings& margin, double theta) {
    const double turned = turned_angle(margin, theta);
    const Turn at = turn(turned);
    double psi = turned == kHalfPi ? 0.0 : at.cosine;
    double derivative = 1.0;
    if (margin.guard && turned > kPi) {
        // Past the turning point the logit follows the cosine, shifted so that it never rises.
        double shift = -1.0 - turn((kPi - margin.m2) / margin.m1).cosine;
        if (margin.m1 == 1.0) {
            const Turn edge = turn(margin.m2);
            const double arcface = -margin.m2 * edge.sine, least = edge.cosine - 1.0;
            shift = arcface < least ? arcface : least;
        }
        psi = cosine(theta) + shift;
    } else if (!margin.straight_through) {
        const double sine = turn(theta).sine;
        derivative = margin.m1 * at.sine / (sine > kLeastSine ? sine : kLeastSine);
    }
    return Target{margin.scale * (psi - margin.m3), derivative};
}

// src/margin.rs Margin::derivative_by_m2
PFC_DEVICE double derivative_by_m2(const MarginSettings& margin, double theta) {
    const double turned = turned_angle(margin, theta);
    if (!(margin.guard && turned > kPi)) {
        return -turn(turned).sine;
    }
    if (margin.m1 != 1.0) {
        return -turn((kPi - margin.m2) / margin.m1).sine / margin.m1;
    }
    const Turn edge = turn(margin.m2);
    const bool arcface = -margin.m2 * edge.sine < edge.cosine - 1.0;
    return -edge.sine - (arcface ? margin.m2 * edge.cosine : 0.0);
}

}  // namespace margin
