"""Kernels that are as they should be, and kernels with faults, for `kernels/gates --self-test`."""

# A kernel that is as it should be, and faults; each with a word that the refusal must have, or None.
MULTIPLY = """
PFC_DEVICE void multiply(float (&d)[4], uint32_t a) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a));
}
PFC_KERNEL(planted, (float* x, uint32_t a)) {
    float d[4] = {x[0], x[1], x[2], x[3]};
    multiply(d, a);
    multiply(d, a);
    x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""
PLAIN = "PFC_KERNEL(planted, (float* x)) { x[threadIdx.x] *= 3.0f; }\n"
MANY = """
PFC_KERNEL(planted, (float* x)) {
    float v[64];
#pragma unroll
    for (int i = 0; i < 64; i++) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = v[i] * v[(i * 7 + 3) % 64] + v[63 - i];
}
"""
TIGHT = MANY.replace("PFC_KERNEL(planted,", "PFC_KERNEL_OF(planted, 1024, 2,")  # 32 registers
LOCAL = """
PFC_KERNEL(planted, (float* x, const int* places)) {
    float v[16];
    for (int i = 0; i < 16; i++) v[i] = x[i];
    for (int i = 0; i < 64; i++) v[places[i] & 15] += x[i];
    x[threadIdx.x] = v[places[threadIdx.x] & 15];
}
"""
STATIC = """
PFC_KERNEL(planted, (float* x)) {
    __shared__ float v[1024];
    v[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = v[1023 - threadIdx.x];
}
"""
# The accumulators of a wgmma under way are read, so that ptxas puts waits between.
SERIAL = """
PFC_DEVICE void multiply(float (&d)[4], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
}
PFC_KERNEL(planted, (float* x, uint64_t a, uint64_t b)) {
    float d[4] = {x[0], x[1], x[2], x[3]};
    asm volatile("wgmma.fence.sync.aligned;");
    multiply(d, a, b);
    d[0] += 1.0f;
    multiply(d, a, b);
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
    x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""
# A main loop: 1024 bytes of ldmatrix for two products of 4096 operations.
LOOP = """
#include "ptx/ldmatrix.h"
#include "ptx/mma.h"
PFC_KERNEL(planted, (float* x, int steps)) {
    PFC_DYNAMIC_SHARED(shared);
    const unsigned char* stage = shared + 16 * threadIdx.x;
    float d[2][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step, stage += 1024) {
        uint32_t a[4], b[4];
        ptx::ldmatrix_x4(a, stage);
        ptx::ldmatrix_x4(b, stage + 512);
        ptx::mma_half(d[0], a, b[0], b[1]);
        ptx::mma_half(d[1], a, b[2], b[3]);
    }
    x[threadIdx.x] = d[0][0] + d[0][1] + d[0][2] + d[0][3] + d[1][0] + d[1][1] + d[1][2] + d[1][3];
}
"""
TWICE = LOOP.replace("ptx::mma_half(d[1], a,", "ptx::ldmatrix_x4(a, stage);\n        ptx::mma_half(d[1], a,")
SMALL = LOOP.replace("ptx::mma_half(d[1], a, b[2], b[3]);", "")
BYTES = "// gate: planted registers <= 255 shared kBytes <= {}\nconstexpr int kBytes = 4096;\n"
# Two multiplications in the variant `other`, one in what ships.
OTHER = MULTIPLY.replace("    multiply(d, a);\n", "    if (PFC_VARIANT == other) multiply(d, a);\n", 1)
OF_VARIANT = """// gate: planted registers <= 255 HMMA 1
// gate: planted of other HMMA {}
#ifndef PFC_VARIANT
#define PFC_VARIANT shipped
#endif
enum {{ shipped, other }};
"""
PLANTED = [
    ("nothing wrong", "// gate: planted registers <= 255 HMMA 2\n", MULTIPLY, "80", None),
    ("dynamic shared memory within", BYTES.format(4096), PLAIN, "80", None),
    ("a stack with a reason", "// gate: planted registers <= 255\n// gate: planted stack 64 because planted\n", LOCAL, "80", None),
    ("a wrong number of HMMA", "// gate: planted registers <= 255 HMMA 4\n", MULTIPLY, "80", "2 HMMA"),
    ("HMMA that no gate names", "// gate: planted registers <= 255\n", MULTIPLY, "90a", "2 HMMA"),
    ("HMMA named for elsewhere", "// gate: planted registers <= 255\n// gate: planted on 80 HMMA 2\n", MULTIPLY, "86", "2 HMMA"),
    ("spills", "// gate: planted registers <= 255\n", TIGHT, "80", "bytes of spills"),
    ("spills under a stack's reason", "// gate: planted registers <= 255 stack 999 because planted\n", TIGHT, "80", "bytes of spills"),
    ("a stack frame", "// gate: planted registers <= 255\n", LOCAL, "80", "stack frame"),
    ("local memory", "// gate: planted registers <= 255\n", LOCAL, "120", "local loads and stores"),
    ("a larger stack than its reason", "// gate: planted registers <= 255 stack 16 because planted\n", LOCAL, "80", "stack frame"),
    ("too many registers", "// gate: planted registers <= 32\n", MANY, "80", "registers, its gate allows 32"),
    ("static shared memory", "// gate: planted registers <= 255 shared <= 1024\n", STATIC, "80", "4096 bytes of shared memory"),
    ("dynamic shared memory", BYTES.format(4095), PLAIN, "80", "limit of 4095"),
    ("an entry without a gate", "", PLAIN, "80", "no gate"),
    ("a gate without an entry", "// gate: planted registers <= 255\n// gate: gone registers <= 255\n", PLAIN, "80", "no entry"),
    ("wgmma serialized", "// gate: planted registers <= 255 HGMMA 2\n", SERIAL, "90a", "serialized"),
    ("a main loop within its traffic", "// gate: planted registers <= 255 HMMA 2 traffic <= 125\n", LOOP, "90a", None),
    ("an operand read twice", "// gate: planted registers <= 255 HMMA 2 traffic <= 125\n", TWICE, "80", "187.5 bytes of shared memory"),
    ("a smaller tile of a warp", "// gate: planted registers <= 255 HMMA 1 traffic <= 125\n", SMALL, "90a", "250.0 bytes of shared memory"),
    ("a main loop that no gate names", "// gate: planted registers <= 255 HMMA 2\n", LOOP, "80", "its gate allows 0"),
    ("traffic without a main loop", "// gate: planted registers <= 255 HMMA 2 traffic <= 125\n", MULTIPLY, "80", "no main loop"),
    ("a variant with its own gate", OF_VARIANT.format(2), OTHER, "80", None, "other"),
    ("a variant's fault", OF_VARIANT.format(4), OTHER, "80", "2 HMMA", "other"),
    ("a variant's gate for what ships", OF_VARIANT.format(2), OTHER, "80", None),
    ("what does not compile", "// gate: planted registers <= 255\n", PLAIN.replace("3.0f", "nothing"), "80", "nothing"),
]


# The same of images that a build has left: whether the source of the image has a fault, whether there is a log.
BUILT = [
    ("a build's image", MULTIPLY, True, None),
    ("a build's image with a fault", MULTIPLY.replace("    multiply(d, a);\n", "", 1), True, "1 HMMA"),
    ("a build's image without the report of ptxas", MULTIPLY, False, "no planted.80.log"),
]

# Machine code, and what the model tells of it. The loop around the main loop and a loop without products do not count; of the main
# loop's loads one never runs, and a copy may run.
CODE = """
\t\tFunction : planted
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x00000a0000017a02 */
                                                                            /* 0x000fe40000000f00 */
        /*0010*/                   LDS.128 R4, [R1] ;                       /* 0x0 */
        /*0020*/              @!P1 BRA 0x10 ;                               /* 0x0 */
        /*0030*/                   DEPBAR.LE SB0, 0x1 ;                     /* 0x0 */
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;            /* 0x0 */
        /*0050*/              @!PT LDS RZ, [RZ] ;                           /* 0x0 */
        /*0060*/                   LDSM.16.M88.4 R28, [R8] ;                /* 0x0 */
        /*0070*/                   LDSM.16.MT88.2 R20, [R8+0x400] ;         /* 0x0 */
        /*0080*/                   LDS.U16 R3, [R9] ;                       /* 0x0 */
        /*0090*/                   LDS.64 R2, [R9] ;                        /* 0x0 */
        /*00a0*/               @P2 LDGSTS.E.BYPASS.128 [R41], [R8.64] ;     /* 0x0 */
        /*00b0*/                   HMMA.16816.F32 R88, R28.reuse, R20, R88 ; /* 0x0 */
        /*00c0*/                   HMMA.1688.F32.BF16 R84, R28, R21, R84 ;  /* 0x0 */
        /*00d0*/                   LDGDEPBAR ;                              /* 0x0 */
        /*00e0*/              @!P0 BRA 0x30 ;                               /* 0x0 */
        /*00f0*/                   STG.E [R2.64], R88 ;                     /* 0x0 */
        /*0100*/                   BRA 0x0 ;                                /* 0x0 */
        /*0110*/                   BRA 0x110 ;                              /* 0x0 */
"""
# Bytes read: 512 and 256 by ldmatrix, 64 and 256 by loads. Operations: 4096 and 2048.
COUNTED = "planted 80 2 1088 512 10 2 260.4 3.0 12.5 10.8 3.0 shared 492 24 %"
