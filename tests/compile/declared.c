/* Nothing but the declarations. */
#include "chaos.h"
