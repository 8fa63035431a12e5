// What bindgen sees in place of mlx-c's half.h: the half types that mlx-rs expects, as bits.
#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16
#include <stdint.h>

typedef struct {
  uint16_t bits;
} float16_t;
typedef uint16_t bfloat16_t;
