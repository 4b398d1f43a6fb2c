/* Reading the query of a path. Pure. */
#ifndef HYPEMAN_EGRESS_QUERY_H
#define HYPEMAN_EGRESS_QUERY_H

#include "h1.h"

struct str query_of(struct str path, struct str *before); /* behind '?', which belongs to neither part */
struct str next_parameter(struct str *query);             /* cuts one off */
struct str parameter_name(struct str parameter);
struct str parameter_value(struct str parameter); /* behind '=' */
int next_decoded(struct str *s);                  /* cuts the next byte off, percent-decoded; -1 at the end */
bool same_decoded(struct str a, struct str b);

#endif
