/* A libc header first: fine in gnu mode, must stop with the fix named in strict mode. */
#include <stdio.h>
#define CHAOS_IMPLEMENTATION
#include "chaos.h"
#include "main.h"
