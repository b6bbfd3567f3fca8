// Draws, findings, memory and matrices.
#include "fuzz.h"

#include <stdarg.h>

uint64_t draw(struct draws *d) {
  uint64_t z = d->state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
uint64_t below(struct draws *d, uint64_t n) { return n == 0 ? 0 : draw(d) % n; }
int chance(struct draws *d, int permille) { return below(d, 1000) < (uint64_t)permille; }
double unit(struct draws *d) { return (double)(draw(d) >> 11) / 9007199254740992.0; }

////////////////////////////////////////////////////////////////////////////////////////////////////

const char *const mode_names[MODES] = {"single", "ranks", "custom", "lies", "kernels"};
__thread struct episode now;
int exact, verbose;

enum { NOTES = 12, NOTE = 160, FUNCTIONS = 96, KINDS = 128 };
static __thread char notes[NOTES][NOTE];
static __thread unsigned noted;
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static long found, made;
static struct {
  const char *format;
  int times;
} shown[KINDS];
static struct {
  const char *name;
  long ok, failed;
} counted[FUNCTIONS];

void note(const char *format, ...) {
  va_list list;
  va_start(list, format);
  char *line = notes[noted++ % NOTES];
  vsnprintf(line, NOTE, format, list);
  va_end(list);
  if (verbose) fprintf(stderr, "[rank %d] %s\n", now.rank, line);
}

void finding(const char *format, ...) {
  va_list list;
  va_start(list, format);
  pthread_mutex_lock(&one_at_a_time);
  // The same again tells little.
  int kind = 0;
  while (kind < KINDS - 1 && shown[kind].format && shown[kind].format != format) kind++;
  shown[kind].format = format;
  found++;
  if (shown[kind].times++ < 2) {
    fprintf(stderr, "FINDING %s %llu, rank %d: ", mode_names[now.mode],
            (unsigned long long)now.seed, now.rank);
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n  the last error: %s\n", pfc_last_error());
    for (unsigned i = noted > NOTES ? noted - NOTES : 0; i < noted; i++)
      fprintf(stderr, "    %s\n", notes[i % NOTES]);
  }
  pthread_mutex_unlock(&one_at_a_time);
  va_end(list);
}
long findings(void) { return __atomic_load_n(&found, __ATOMIC_RELAXED); }

static void count(const char *name, int ok) {
  pthread_mutex_lock(&one_at_a_time);
  int at = 0;
  while (at < FUNCTIONS - 1 && counted[at].name && strcmp(counted[at].name, name) != 0) at++;
  counted[at].name = name;
  *(ok ? &counted[at].ok : &counted[at].failed) += 1;
  made++;
  pthread_mutex_unlock(&one_at_a_time);
}

pfc_status did(const char *call, pfc_status status) {
  count(call, status == PFC_OK);
  note("%s: %s", call, pfc_status_name(status));
  if (verbose && status != PFC_OK) fprintf(stderr, "[rank %d]   %s\n", now.rank, pfc_last_error());
  switch (status) {
    case PFC_ERROR_PANIC: finding("%s panicked", call); break;
    case PFC_ERROR_DEVICE: finding("%s gave %s", call, pfc_status_name(status)); break;
    // A folder that is none, or a checkpoint that was not saved.
    case PFC_ERROR_IO:
      if (strncmp(call, "pfc_head_save", 13) != 0 && strcmp(call, "pfc_head_load") != 0)
        finding("%s gave %s", call, pfc_status_name(status));
      break;
    // What came from another rank may be damaged where the transport lies.
    case PFC_ERROR_CORRUPT:
      if (now.mode != LIES) finding("%s gave %s", call, pfc_status_name(status));
      break;
    default:
      if (status < PFC_OK || status > PFC_ERROR_PANIC) finding("%s gave %d", call, (int)status);
  }
  if (status != PFC_OK && pfc_last_error()[0] == 0) finding("%s gave no text", call);
  return status;
}

void called(const char *call) {
  count(call, 1);
  note("%s", call);
}
long calls(void) { return __atomic_load_n(&made, __ATOMIC_RELAXED); }

void print_calls(void) {
  for (int i = 0; i < FUNCTIONS && counted[i].name != NULL; i++)
    printf("called %s %ld ok %ld failed\n", counted[i].name, counted[i].ok, counted[i].failed);
}

////////////////////////////////////////////////////////////////////////////////////////////////////

enum { ZONE = 64, ZONE_BYTE = 0xE7 };

struct block block_of(size_t bytes, int fill) {
  struct block b = {NULL, NULL, NULL, bytes};
  size_t zone = exact ? 0 : ZONE;
  b.base = malloc(bytes + 2 * zone + (bytes + zone == 0));
  b.data = b.base + zone;
  memset(b.base, ZONE_BYTE, bytes + 2 * zone);
  if (bytes > 0) memset(b.data, fill, bytes);
  return b;
}
void keep(struct block *b) {
  free(b->copy);
  b->copy = malloc(b->bytes + 1);
  memcpy(b->copy, b->data, b->bytes);
}
int is_kept(const struct block *b) { return memcmp(b->copy, b->data, b->bytes) == 0; }
void drop(struct block *b) {
  for (size_t i = 0; i < ZONE && !exact; i++) {
    if (b->base[i] != ZONE_BYTE) finding("byte %zu before a buffer was written", ZONE - i);
    if (b->data[b->bytes + i] != ZONE_BYTE) finding("byte %zu after a buffer was written", i);
  }
  free(b->base);
  free(b->copy);
}

////////////////////////////////////////////////////////////////////////////////////////////////////

size_t size_of(int32_t dtype) {
  switch (dtype) {
    case PFC_F16:
    case PFC_BF16: return 2;
    case PFC_F64:
    case PFC_I64: return 8;
    default: return 4;
  }
}

static const uint32_t special_f32[] = {
    0x00000000, 0x80000000, 0x00000001, 0x007fffff, 0x00800000, 0x7f7fffff, 0xff7fffff, 0x7f800000,
    0xff800000, 0x7fc00000, 0x7f800001, 0xffc12345, 0x2b8cbccc, 0x5d5e0b6b, 0x477fe000, 0x33800000};
static const uint16_t special_f16[] = {0x0000, 0x8000, 0x0001, 0x03ff, 0x0400, 0x7bff,
                                       0xfbff, 0x7c00, 0xfc00, 0x7e00, 0x7c01};

static void put_element(struct draws *d, unsigned char *to, int32_t dtype, int wild) {
  int special = chance(d, wild);
  float number = (float)(unit(d) * 2 - 1);
  uint32_t bits;
  uint16_t half;
  memcpy(&bits, &number, 4);
  if (special) bits = special_f32[below(d, sizeof special_f32 / sizeof *special_f32)];
  if (dtype == PFC_F16) {
    // Up to 1 in size, and no subnormal.
    half = (uint16_t)((draw(d) & 0x83ff) | (1 + below(d, 14)) << 10);
    if (special) half = special_f16[below(d, sizeof special_f16 / sizeof *special_f16)];
    memcpy(to, &half, 2);
  } else if (dtype == PFC_BF16) {
    half = (uint16_t)(bits >> 16);
    memcpy(to, &half, 2);
  } else {
    memcpy(to, &bits, 4);
  }
}

struct grid grid_of(struct draws *d, uint64_t rows, uint64_t cols, int only_f32, int wild) {
  struct grid g;
  memset(&g, 0, sizeof g);
  int32_t dtype = only_f32 ? PFC_F32 : 1 + (int32_t)below(d, 3);
  g.rows = rows;
  g.cols = cols;
  g.stride = cols + (chance(d, 300) ? below(d, 7) : 0);
  size_t size = g.size = size_of(dtype);
  g.memory = block_of(rows == 0 ? 0 : ((rows - 1) * g.stride + cols) * size, 0xA5);
  for (uint64_t i = 0; i < rows; i++)
    for (uint64_t j = 0; j < cols; j++)
      put_element(d, g.memory.data + (i * g.stride + j) * size, dtype, wild);
  keep(&g.memory);
  g.m.data = rows > 0 || chance(d, 500) ? g.memory.data : NULL;
  g.m.dtype = dtype;
  g.m.rows = rows;
  g.m.cols = cols;
  g.m.row_stride = g.stride;
  return g;
}

int gaps_are_kept(const struct grid *g) {
  for (uint64_t i = 0; i + 1 < g->rows; i++) {
    size_t from = (i * g->stride + g->cols) * g->size, to = (i + 1) * g->stride * g->size;
    if (memcmp(g->memory.data + from, g->memory.copy + from, to - from) != 0) return 0;
  }
  return 1;
}

int is_finite(const struct grid *g) {
  for (uint64_t i = 0; i < g->rows; i++) {
    for (uint64_t j = 0; j < g->cols; j++) {
      const unsigned char *at = g->memory.data + (i * g->stride + j) * g->size;
      uint32_t bits = 0;
      memcpy(&bits, at, g->size);
      if (g->m.dtype == PFC_BF16) bits <<= 16;
      uint32_t exponent = g->m.dtype == PFC_F16 ? 0x7c00 : 0x7f800000;
      if ((bits & exponent) == exponent) return 0;
    }
  }
  return 1;
}

void drop_grid(struct grid *g) { drop(&g->memory); }

int spoil(struct draws *d, struct grid *g, int rows_count) {
  switch (below(d, 10)) {
    case 0: g->m.dtype = ONE_OF(d, int32_t, 0, 4, 5, 6, 7, -1, INT32_MIN, 1000); return 1;
    case 1: g->m.reserved = 1 + (uint32_t)below(d, 5); return 1;
    case 2:
      if (g->cols == 0) return 0;
      g->m.row_stride = below(d, g->cols);
      return g->rows > 0;
    case 3:
      if (g->cols == 0) return 0;
      g->m.rows = ONE_OF(d, uint64_t, 1ull << 62, UINT64_MAX, 1ull << 63, UINT64_MAX / 2);
      return 1;
    case 4:
      g->m.cols = ONE_OF(d, uint64_t, 1ull << 62, UINT64_MAX, 0xffffffffffffull);
      return g->rows > 0;
    case 5:
      if (g->rows < 2) return 0;
      g->m.row_stride = ONE_OF(d, uint64_t, 1ull << 62, UINT64_MAX, UINT64_MAX / 2 + 1);
      return 1;
    case 6: g->m.data = NULL; return g->rows > 0 && g->cols > 0;
    case 7:
      if (g->rows == 0 || g->cols == 0) return 0;
      g->m.data = (char *)g->m.data + 1;
      return 1;
    case 8:
      if (!rows_count || g->cols == 0) return 0;
      g->m.rows += 100000000 + below(d, 1u << 30);
      return 1;
    default:
      if (g->cols < 2) return 0;
      g->m.cols -= 1;
      return g->rows > 0;
  }
}
