#include "probe.h"

#include "tests/harness.h"

std::vector<float> probe_mma(bool half, int32_t wrong, const std::vector<uint32_t>& a,
                             const std::vector<uint32_t>& b, const std::vector<float>& c) {
    Buffer<uint32_t> in_a(a), in_b(b);
    Buffer<float> in_c(c), out(c.size());
    launch("probe_mma", unsigned(c.size() / 128), 32, 0, int32_t(half), wrong,
           (const uint32_t*)in_a.device(), (const uint32_t*)in_b.device(),
           (const float*)in_c.device(), out.device());
    return out.host();
}

std::vector<uint32_t> probe_ldmatrix(bool transposed, int32_t wrong,
                                     const std::vector<uint16_t>& memory,
                                     const std::vector<uint32_t>& rows) {
    Buffer<uint16_t> in(memory);
    Buffer<uint32_t> in_rows(rows), out(128);
    launch("probe_ldmatrix", 1, 32, 512, int32_t(transposed), wrong, (const uint16_t*)in.device(),
           (const uint32_t*)in_rows.device(), out.device());
    return out.host();
}

std::vector<uint32_t> probe_swizzle(uint32_t columns, int32_t wrong) {
    Buffer<uint32_t> out(128 * columns / 8);
    launch("probe_swizzle", 1, 256, 0, columns, wrong, out.device());
    return out.host();
}

std::string probe_findings() { return take_findings(); }
