/*
 * What a head takes before there is one: the table that PartialFC was published with, beside what
 * pfc_plan says of this library, with the formula of each number.
 *
 *   cc -std=c99 plan.c -lpartialfc && ./a.out --ranks 64 --batch 64 --classes 10000000
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "partialfc.h"

static unsigned long long ranks = 64, batch = 64, dim = 512, classes = 10000000;
static double rate = 0.1;
static int wrong;

enum { DATA_PARALLEL, MODEL_PARALLEL, PARTIAL_FC };
static const char *const names[] = {"data parallel", "model parallel", "PartialFC"};
static pfc_plan_report plans[3];

static const char *bytes_text(double bytes) {
  static char text[32];
  if (bytes >= 1e9) snprintf(text, sizeof text, "%.2f GB", bytes / 1e9);
  else if (bytes >= 1e6) snprintf(text, sizeof text, "%.2f MB", bytes / 1e6);
  else snprintf(text, sizeof text, "%.2f kB", bytes / 1e3);
  return text;
}

/* A number: published, planned, and its formula, which must give what is planned or, for memory
 * that is kept in whole blocks (AT_LEAST), no more. */
enum { EXACTLY, AT_LEAST };

static void row(int column, const char *published, uint64_t planned, int how, uint64_t formula,
                const char *text) {
  printf("  %-15s %10s %10s  %llu = %s\n", names[column], published, bytes_text((double)planned),
         (unsigned long long)planned, text);
  if (planned < formula || (how == EXACTLY && planned > formula)) {
    printf("  THE FORMULA GIVES %llu\n", (unsigned long long)formula);
    wrong = 1;
  }
}

static void heading(const char *text) { printf("\n%s\n", text); }


static unsigned long long count(const char *option, const char *text) {
  char *rest;
  unsigned long long value = strtoull(text, &rest, 10);
  if (rest == text || *rest != 0 || text[0] == '-') {
    fprintf(stderr, "plan: %s is '%s', not a count\n", option, text);
    exit(2);
  }
  return value;
}

int main(int argc, char **argv) {
  unsigned long long shard, sample, rows, labels, embeddings;
  int i, column;
  for (i = 1; i < argc; i += 2) {
    const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (value != NULL && strcmp(option, "--ranks") == 0) ranks = count(option, value);
    else if (value != NULL && strcmp(option, "--batch") == 0) batch = count(option, value);
    else if (value != NULL && strcmp(option, "--dim") == 0) dim = count(option, value);
    else if (value != NULL && strcmp(option, "--classes") == 0) classes = count(option, value);
    else if (value != NULL && strcmp(option, "--sample-rate") == 0) rate = atof(value);
    else {
      fprintf(stderr, "usage: plan [--ranks N] [--batch b] [--dim d] [--classes C] "
                      "[--sample-rate r]\nb is the rows of one rank\n");
      return 2;
    }
  }
  for (column = DATA_PARALLEL; column <= PARTIAL_FC; column++) {
    pfc_head_options options;
    pfc_status status = pfc_head_options_init(&options);
    options.num_classes = classes;
    options.embedding_dim = (uint32_t)dim;
    options.max_batch = batch;
    options.placement = column == DATA_PARALLEL ? PFC_PLACEMENT_REPLICATED : PFC_PLACEMENT_SHARDED;
    options.sample_rate = column == PARTIAL_FC ? rate : 1;
    if (status == PFC_OK) status = pfc_plan_report_init(&plans[column]);
    if (status == PFC_OK) status = pfc_plan(&options, (uint32_t)ranks, batch, &plans[column]);
    if (status != PFC_OK) {
      fprintf(stderr, "plan: %s: %s\n", pfc_status_name(status), pfc_last_error());
      return 1;
    }
  }
  shard = (classes + ranks - 1) / ranks;
  sample = (unsigned long long)(rate * (double)shard);
  rows = ranks * batch;

  printf("N = %llu ranks, b = %llu rows on each, B = N b = %llu, d = %llu, C = %llu, rate %g;\n"
         "a shard has c = C/N = %llu classes, a sample s = rate c = %llu, or the batch's if more\n",
         ranks, batch, rows, dim, classes, rate, shard, sample);
  if (sample < rows) sample = rows < shard ? rows : shard;
  printf("\n%17s %10s %10s  ours in bytes = its formula\n", "", "published", "ours");
  printf("%17s (for N = 64, b = 64, d = 512, C = 10000000, rate 0.1)\n", "");

  heading("Class centers, on each rank. The table's GB are GiB; 298 MB are 19.07/64 of them.");
  row(0, "19.07 GB", plans[0].weight_bytes, EXACTLY, 4 * classes * dim, "4 C d");
  row(1, "298 MB", plans[1].weight_bytes, EXACTLY, 4 * shard * dim, "4 c d");
  row(2, "298 MB", plans[2].weight_bytes, EXACTLY, 4 * shard * dim, "4 c d");

  heading("Logits (ours: the softmax's numerators), on each rank. The table has 4 B C bytes, in\n"
          "MiB/1000, for data parallel, where a rank needs 4 b C: its own rows'. Ours are kept in\n"
          "whole blocks; where workspace_limit leaves no room they are computed twice instead.");
  row(0, "156 GB", plans[0].probability_bytes, AT_LEAST, 4 * batch * classes, "4 b C, in blocks");
  row(1, "2.44 GB", plans[1].probability_bytes, AT_LEAST, 4 * rows * shard, "4 B c, in blocks");
  row(2, "250 MB", plans[2].probability_bytes, AT_LEAST, 4 * rows * sample, "4 B s, in blocks");

  heading("What a rank hands to collectives in a step.");
  heading("All-gather: labels and where the rank is; embeddings. The table's 384 KB are three\n"
          "times a rank's embeddings, 4 b d; it does not say why three. Ours are 2 b d where they\n"
          "travel in 16 bits, as in half precision.");
  labels = 8 * (batch + 12);
  embeddings = 4 * batch * dim;
  row(0, "-", plans[0].labels_bytes + plans[0].embeddings_bytes, EXACTLY, labels, "8 (b + 12)");
  for (column = 1; column < 3; column++) {
    row(column, "384 KB", plans[column].labels_bytes + plans[column].embeddings_bytes, EXACTLY,
        labels + embeddings, "8 (b + 12) + 4 b d");
  }

  heading("Softmax (all-reduce): two numbers for each row of the global batch, and four of the\n"
          "step's; data parallel: each rank's loss and status, and what its sample is.");
  row(0, "-", plans[0].sums_bytes, EXACTLY, 8 * (4 + 4 * ranks), "8 (4 + 4 N)");
  for (column = 1; column < 3; column++) {
    row(column, "32 KB", plans[column].sums_bytes, EXACTLY, 4 * (2 * rows + 4), "4 (2 B + 4)");
  }

  heading("Gradients: an all-reduce of the class centers' for data parallel, else a\n"
          "reduce-scatter of the embeddings'. The table has 2 |W| for data parallel, what a ring\n"
          "moves; ours is what is handed over, once. Else it has logits and their gradients of a\n"
          "sample, 2 x 4 B s (488 MB, in MiB), and for model parallel 2 x 4 B d more. Ours is\n"
          "smaller because the method needs less: logits and their gradients stay on the rank that\n"
          "has the classes, and what ranks owe each other is the embeddings' gradient.");
  row(0, "38 GB", plans[0].grad_centers_bytes, EXACTLY, 4 * classes * dim, "4 C d");
  row(1, "505 MB", plans[1].grad_embeddings_bytes, EXACTLY, 4 * rows * dim, "4 B d");
  row(2, "488 MB", plans[2].grad_embeddings_bytes, EXACTLY, 4 * rows * dim, "4 B d");

  heading("All of a step. The table has 38 GB for data parallel, and else twice its gradients.");
  row(0, "38 GB", plans[0].traffic_bytes, EXACTLY,
      4 * classes * dim + labels + 8 * (4 + 4 * ranks), "4 C d + 8 (b + 12) + 8 (4 + 4 N)");
  for (column = 1; column < 3; column++) {
    row(column, column == 1 ? "1.01 GB" : "0.98 GB", plans[column].traffic_bytes, EXACTLY,
        labels + embeddings + 4 * (2 * rows + 4) + 4 * rows * dim,
        "8 (b + 12) + 4 b d + 4 (2 B + 4) + 4 B d");
  }
  return wrong;
}
