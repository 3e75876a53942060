/* A board of weights: buffers that one process writes in turn and others on its node copy from.
 *
 * It is a sequence lock. Each buffer has a stamp: its version + 1, or 0 while nothing whole is in it;
 * so zeroed memory is an empty board. A reader looks at the stamp, copies, looks again, and throws
 * away what it copied if the stamp has changed.
 *
 * C11 has no word for what one process copies while another writes it. By relaxed atomics it would
 * be defined, and takes 1.8 times as long; what counts is that the copy stays between the two looks,
 * and the writing between the two stamps. The fences that keep them there are full ones, as weaker
 * ones do not hold streaming stores on x86.
 */

#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "stream.h"
#include "widening.h"

#define ABI_VERSION 1
#define NONE -1

_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_LLONG_LOCK_FREE == 2,
               "a lock would belong to one process");

typedef struct {
    _Atomic uint32_t num_published; /* modulo 2^32; readers sleep on it */
    _Atomic int64_t stamps[];       /* one a buffer */
} board;

int board_abi(void) { return ABI_VERSION; }

/* The writer is about to change this buffer. */
void board_begin(board *shared, int buffer) {
    atomic_store_explicit(&shared->stamps[buffer], 0, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
}

/* The buffer is whole, and the newest one. */
void board_publish(board *shared, int buffer, int64_t version) {
    atomic_thread_fence(memory_order_seq_cst);
    atomic_store_explicit(&shared->stamps[buffer], version + 1, memory_order_release);
    atomic_fetch_add_explicit(&shared->num_published, 1, memory_order_release);
    syscall(SYS_futex, &shared->num_published, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

uint32_t board_num_published(board *shared) {
    return atomic_load_explicit(&shared->num_published, memory_order_acquire);
}

/* Sleep while num_published is `seen`, but not for longer than this; 0 if it still is. */
int board_wait(board *shared, uint32_t seen, double timeout_s) {
    struct timespec timeout = {.tv_sec = (time_t)timeout_s};
    timeout.tv_nsec = (long)((timeout_s - (double)timeout.tv_sec) * 1e9);
    syscall(SYS_futex, &shared->num_published, FUTEX_WAIT, seen, &timeout, NULL, 0);
    return board_num_published(shared) != seen;
}

/* Copy the newest whole buffer, of n elements, if its version is at least min_version, which is not
 * negative. Returns the version; NONE if there is no such, or it was overwritten meanwhile: then
 * `out` holds anything.
 */
int64_t board_read(board *shared, int num_buffers, const char *buffers, size_t stride_bytes,
                   int is_bfloat16, float *out, size_t n, int64_t min_version) {
    int64_t newest = 0;
    int buffer = 0;
    for (int i = 0; i < num_buffers; i++) {
        int64_t stamp = atomic_load_explicit(&shared->stamps[i], memory_order_acquire);
        if (stamp > newest) newest = stamp, buffer = i;
    }
    if (newest <= min_version) return NONE;
    const void *values = buffers + (size_t)buffer * stride_bytes;
    if (is_bfloat16)
        widen_past_caches(out, values, n);
    else
        stream(out, values, n * sizeof *out);
    end_stream();
    atomic_thread_fence(memory_order_seq_cst);
    int64_t stamp = atomic_load_explicit(&shared->stamps[buffer], memory_order_relaxed);
    return stamp == newest ? newest - 1 : NONE;
}
