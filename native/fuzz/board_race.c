/* One thread publishes on a board and two read from it: for ThreadSanitizer, which looks into one
 * process only. `board_race SECONDS` fails when a reader got a vector that is not of one version, or
 * got none.
 */

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NUM_BUFFERS 3
#define N 5000
#define STRIDE_BYTES (N * sizeof(float))

void board_begin(void *shared, int buffer);
void board_publish(void *shared, int buffer, int64_t version);
uint32_t board_num_published(void *shared);
int board_wait(void *shared, uint32_t seen, double timeout_s);
int64_t board_read(void *shared, int num_buffers, const char *buffers, size_t stride_bytes,
                   int is_bfloat16, float *out, size_t n, int64_t min_version);

typedef struct {
    _Alignas(64) char shared[64];
    char buffers[NUM_BUFFERS * STRIDE_BYTES];
    int is_bfloat16;
    atomic_int is_over;
} arena;

/* Of 251 versions each has another number, and bfloat16 holds it. */
static float value_of(int64_t version) { return (float)(version % 251); }

/* ThreadSanitizer is not to see it: that values change while they are copied is how a board works. */
__attribute__((no_sanitize("thread"))) static void write_values(void *values, float value, int is_bfloat16) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    for (int i = 0; i < N; i++) {
        if (is_bfloat16)
            ((uint16_t *)values)[i] = (uint16_t)(bits >> 16);
        else
            ((uint32_t *)values)[i] = bits;
    }
}

static void *write_versions(void *argument) {
    arena *all = argument;
    int64_t version = 0;
    for (; !atomic_load(&all->is_over); version++) {
        int buffer = (int)(version % NUM_BUFFERS);
        board_begin(all->shared, buffer);
        write_values(all->buffers + buffer * STRIDE_BYTES, value_of(version), all->is_bfloat16);
        board_publish(all->shared, buffer, version);
    }
    printf("%" PRId64 " versions\n", version);
    return NULL;
}

static void *read_versions(void *argument) {
    arena *all = argument;
    static _Thread_local float out[N];
    int64_t num_read = 0, last = -1;
    while (!atomic_load(&all->is_over)) {
        uint32_t seen = board_num_published(all->shared);
        int64_t version = board_read(all->shared, NUM_BUFFERS, all->buffers, STRIDE_BYTES,
                                     all->is_bfloat16, out, N, last + 1);
        if (version < 0) {
            board_wait(all->shared, seen, 0.01);
            continue;
        }
        for (int i = 0; i < N; i++)
            if (out[i] != value_of(version)) abort();
        num_read++, last = version;
    }
    printf("%" PRId64 " read\n", num_read);
    return num_read ? all : NULL;
}

int main(int argc, char **argv) {
    int all_read = 1;
    for (int is_bfloat16 = 0; is_bfloat16 < 2; is_bfloat16++) {
        arena *all = aligned_alloc(64, (sizeof *all + 63) / 64 * 64);
        memset(all, 0, sizeof *all);
        all->is_bfloat16 = is_bfloat16;
        pthread_t threads[3];
        for (int i = 0; i < 3; i++)
            pthread_create(threads + i, NULL, i ? read_versions : write_versions, all);
        struct timespec half = {.tv_sec = argc > 1 ? atoi(argv[1]) : 2};
        half.tv_sec /= 2;
        nanosleep(&half, NULL);
        atomic_store(&all->is_over, 1);
        for (int i = 0; i < 3; i++) {
            void *result;
            pthread_join(threads[i], &result);
            all_read &= i == 0 || result != NULL;
        }
        free(all);
    }
    return !all_read;
}
