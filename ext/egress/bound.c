/* See bound.h. */
#include "bound.h"

#include <string.h>

void bounds_init(struct bounds *b, const uint64_t *each, const uint64_t *total)
{
    memset(b, 0, sizeof *b);
    for (unsigned i = 0; i < B_WINDOWS; i++) {
        b->total[i] = (int64_t)total[i];
        b->each[i] = each[i] < total[i] / 2 ? (int64_t)each[i] : (int64_t)(total[i] / 2);
    }
    b->each[B_WINDOWS] = b->each[B_BYTES];
    b->total[B_WINDOWS] = b->total[B_BYTES];
}

bool bound_take(struct bounds *b, struct usage *one, enum bound what, int64_t n)
{
    if (atomic_fetch_add(&one->used[what], n) + n <= b->each[what]) {
        if (atomic_fetch_add(&b->usage.used[what], n) + n <= b->total[what])
            return true;
        atomic_fetch_sub(&b->usage.used[what], n);
    }
    atomic_fetch_sub(&one->used[what], n);
    return false;
}

void bound_give(struct bounds *b, struct usage *one, enum bound what, int64_t n)
{
    atomic_fetch_sub(&one->used[what], n);
    atomic_fetch_sub(&b->usage.used[what], n);
}
