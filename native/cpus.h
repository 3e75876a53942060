/* A function for all CPUs: compiled for each kind of vector registers, chosen when it is loaded. */

#ifndef CPUS_H
#define CPUS_H

#ifndef FOR_ALL_CPUS /* Tests define it as nothing: they compile for one kind at a time. */
#if defined(__x86_64__) && defined(__GNUC__)
#define FOR_ALL_CPUS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_ALL_CPUS
#endif
#endif

/* For what such a function calls: a call would leave its vector registers. */
#define INLINE static inline __attribute__((always_inline))

#endif
