/* The loops for any processor of the compiler's target. */
#define GCLKERN_LOOPS baseline
#include "loops.h"
