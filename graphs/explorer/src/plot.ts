// What the charts take of Observable Plot, as a script of its own: charts.js.

import { areaY, dot, lineY, plot, rectY, ruleX, ruleY } from "@observablehq/plot";

const Plot = { areaY, dot, lineY, plot, rectY, ruleX, ruleY };
export type Plot = typeof Plot;
Object.assign(window, { Plot });
