// One drawing, two kinds of paper: a canvas for the screen and for PNG, and text for SVG. Lengths are pixels.

import { FONT } from "./text";

export interface TextStyle {
  size: number;
  fill: string;
  weight?: number;
  anchor?: "start" | "middle" | "end";
}
export interface ShapeStyle {
  fill?: string;
  stroke?: string;
  width?: number;
  dash?: number[];
  alpha?: number;
}
export interface Pen {
  rect(x: number, y: number, width: number, height: number, radius: number, style: ShapeStyle): void;
  circle(x: number, y: number, radius: number, style: ShapeStyle): void;
  polygon(points: number[], style: ShapeStyle): void;
  /** Bézier splines that share a stroke, each moved by (x, y) after scaling by k. */
  curves(paths: Float32Array[], k: number, x: number, y: number, style: ShapeStyle): void;
  text(text: string, x: number, y: number, style: TextStyle): void;
}

export class CanvasPen implements Pen {
  constructor(readonly context: CanvasRenderingContext2D) {}

  private finish({ fill, stroke, width = 1, dash, alpha = 1 }: ShapeStyle): void {
    const c = this.context;
    c.globalAlpha = alpha;
    if (fill) {
      c.fillStyle = fill;
      c.fill();
    }
    if (stroke) {
      c.strokeStyle = stroke;
      c.lineWidth = width;
      if (dash) c.setLineDash(dash);
      c.stroke();
      if (dash) c.setLineDash([]);
    }
    c.globalAlpha = 1;
  }

  rect(x: number, y: number, width: number, height: number, radius: number, style: ShapeStyle): void {
    this.context.beginPath();
    if (radius) this.context.roundRect(x, y, width, height, radius);
    else this.context.rect(x, y, width, height);
    this.finish(style);
  }

  circle(x: number, y: number, radius: number, style: ShapeStyle): void {
    this.context.beginPath();
    this.context.arc(x, y, radius, 0, 7);
    this.finish(style);
  }

  polygon(points: number[], style: ShapeStyle): void {
    this.context.beginPath();
    for (let i = 0; i < points.length; i += 2) this.context[i ? "lineTo" : "moveTo"](points[i], points[i + 1]);
    this.context.closePath();
    this.finish(style);
  }

  curves(paths: Float32Array[], k: number, x: number, y: number, style: ShapeStyle): void {
    const c = this.context;
    c.beginPath();
    for (const p of paths) {
      c.moveTo(p[0] * k + x, p[1] * k + y);
      for (let i = 2; i + 5 < p.length; i += 6)
        c.bezierCurveTo(
          p[i] * k + x,
          p[i + 1] * k + y,
          p[i + 2] * k + x,
          p[i + 3] * k + y,
          p[i + 4] * k + x,
          p[i + 5] * k + y,
        );
    }
    this.finish(style);
  }

  text(text: string, x: number, y: number, { size, fill, weight = 400, anchor = "middle" }: TextStyle): void {
    const c = this.context;
    c.font = `${weight} ${size}px ${FONT}`;
    c.textAlign = anchor === "middle" ? "center" : anchor;
    c.fillStyle = fill;
    c.fillText(text, x, y);
  }
}

const escaped = (text: string) =>
  text
    .replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`)
    .replace(
      /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g,
      "�",
    );
const short = (value: number) => String(Math.round(value * 10) / 10);

export class SvgPen implements Pen {
  readonly parts: string[] = [];

  private style({ fill, stroke, width = 1, dash, alpha = 1 }: ShapeStyle): string {
    const line = stroke ? ` stroke="${stroke}" stroke-width="${short(width)}"` : "";
    const dashes = stroke && dash ? ` stroke-dasharray="${dash.join(" ")}"` : "";
    return `fill="${fill ?? "none"}"${line}${dashes}${alpha < 1 ? ` opacity="${alpha.toFixed(2)}"` : ""}`;
  }

  rect(x: number, y: number, width: number, height: number, radius: number, style: ShapeStyle): void {
    const size = `width="${short(Math.max(0, width))}" height="${short(Math.max(0, height))}"`;
    this.parts.push(`<rect x="${short(x)}" y="${short(y)}" ${size} rx="${short(radius)}" ${this.style(style)}/>`);
  }

  circle(x: number, y: number, radius: number, style: ShapeStyle): void {
    this.parts.push(`<circle cx="${short(x)}" cy="${short(y)}" r="${short(radius)}" ${this.style(style)}/>`);
  }

  polygon(points: number[], style: ShapeStyle): void {
    this.parts.push(`<polygon points="${points.map(short).join(" ")}" ${this.style(style)}/>`);
  }

  curves(paths: Float32Array[], k: number, x: number, y: number, style: ShapeStyle): void {
    for (const path of paths) {
      const at = (i: number) => `${short(path[i] * k + x)} ${short(path[i + 1] * k + y)}`;
      let d = `M${at(0)}`;
      for (let i = 2; i + 5 < path.length; i += 6) d += `C${at(i)} ${at(i + 2)} ${at(i + 4)}`;
      this.parts.push(`<path class="edge" d="${d}" ${this.style(style)}/>`);
    }
  }

  text(text: string, x: number, y: number, { size, fill, weight = 400, anchor = "middle" }: TextStyle): void {
    const font = `font-size="${short(size)}" font-weight="${weight}" text-anchor="${anchor}" fill="${fill}"`;
    this.parts.push(`<text x="${short(x)}" y="${short(y)}" ${font}>${escaped(text)}</text>`);
  }

  open(attributes: string): void {
    this.parts.push(`<g ${attributes}>`);
  }
  close(): void {
    this.parts.push("</g>");
  }

  document(width: number, height: number, title: string): string {
    const size = `width="${Math.ceil(width)}" height="${Math.ceil(height)}" viewBox="0 0 ${Math.ceil(width)} ${Math.ceil(height)}"`;
    const font = escaped(FONT);
    return `<svg xmlns="http://www.w3.org/2000/svg" ${size} font-family="${font}"><title>${escaped(title)}</title>${this.parts.join("\n")}</svg>`;
  }
}
