/* ... and this one calls it. */
#include "chaos.h"
#include "main.h"
