// Prints how the products are launched: an entry, the bytes of its dynamic shared memory and the
// stages of its pipeline, twice where devices of much shared memory take more. Beside images that are
// loaded from a folder, as launches.txt, it holds over the launch table of the host.
#include <stdio.h>

#include <initializer_list>

#include "tune.h"

int main() {
    for (const char* precision : {"half", "f32"}) {
        for (const char* far : {"", "_far"}) {
            printf("gemm_numerators_%s%s %d %d\n", precision, far, kNumeratorsShared,
                   gemm_tile(Gemm::kNumerators).stages);
        }
        printf("gemm_weighted_centers_%s %d %d\n", precision, kWeightedShared,
               gemm_tile(Gemm::kWeightedCenters).stages);
        for (int width : kRowWidths) {
            printf("gemm_center_gradient_%s_%d", precision, width);
            const int stages = gemm_tile(Gemm::kCenterGradient, width).stages;
            for (bool deep : {false, true}) {
                const int these = gemm_tile(Gemm::kCenterGradient, width, deep).stages;
                if (!deep || these != stages) {
                    printf(" %d %d", gemm_shared_bytes(Gemm::kCenterGradient, width, deep), these);
                }
            }
            printf("\n");
        }
    }
    printf("gemm_cosines %d %d\n", kCosinesShared, kSquareTile.stages);
}
